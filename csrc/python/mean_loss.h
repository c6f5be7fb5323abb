// The logit loss of ordinary dense tensors in one call from Python.
#pragma once

#include <pybind11/pybind11.h>

namespace camkd::python {

void add_mean_loss(pybind11::module_& m);

}  // namespace camkd::python
