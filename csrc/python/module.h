// The parts of the Python module, a file each.
#pragma once

#include <pybind11/pybind11.h>

namespace camkd::python {

void add_logit_loss(pybind11::module_& m);    // of CPU tensors themselves, not of their addresses
void add_feature_loss(pybind11::module_& m);  // likewise

}  // namespace camkd::python

namespace camkd::cuda {

void add_bindings(pybind11::module_& m);       // all that follows, and the functions that take addresses
void add_cuda_calls(pybind11::module_& m);     // the logit loss of CUDA tensors themselves
void add_cuda_features(pybind11::module_& m);  // the feature loss likewise

}  // namespace camkd::cuda
