#pragma once

#include <pybind11/pybind11.h>

namespace camkd::cuda {

void add_tensor_calls(pybind11::module_& m);

}  // namespace camkd::cuda
