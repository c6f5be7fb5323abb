// The functions of the Python module for the feature loss of CPU tensors.
#pragma once

#include <pybind11/pybind11.h>

namespace camkd::python {

void add_feature_loss(pybind11::module_& m);

}  // namespace camkd::python
