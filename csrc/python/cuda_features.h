// The functions of the Python module for the feature loss of CUDA tensors.
#pragma once

#include <pybind11/pybind11.h>

namespace camkd::cuda {

void add_cuda_features(pybind11::module_& m);

}  // namespace camkd::cuda
