// The functions of the Python module that take CPU tensors themselves, not their addresses.
#pragma once

#include <pybind11/pybind11.h>

namespace camkd::python {

void add_logit_loss(pybind11::module_& m);

}  // namespace camkd::python
