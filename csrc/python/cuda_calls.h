// The functions of the Python module that take CUDA tensors themselves, not their addresses.
#pragma once

#include <pybind11/pybind11.h>

namespace camkd::cuda {

void add_cuda_calls(pybind11::module_& m);

}  // namespace camkd::cuda
