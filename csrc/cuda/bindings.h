// The CUDA part of the Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace camkd::cuda {

void add_bindings(pybind11::module_& m);

}  // namespace camkd::cuda
