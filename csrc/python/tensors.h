// Tensors as Python objects, read and made in about 0.1 and 1 us, where torch's own methods take several calls each.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>

#include "dlpack.h"

namespace camkd::tensors {

// Takes over `torch.Tensor.__dlpack_c_exchange_api__` and the classes whose instances are nothing but tensors.
// False if this torch offers nothing that we understand: then `look` and `make` must not be called.
bool connect(pybind11::object api, pybind11::type tensor, pybind11::type parameter);

// Fills `out` with what a plain tensor in main memory holds, for as long as `object` lives; false for anything else.
bool look(PyObject* object, dlpack::Tensor& out);

bool requires_grad(PyObject* object);

// A contiguous tensor of uninitialised memory, of recycled pages (cpu/output_memory.h) when it is large. `poison` fills
// it with NaN. Null, with a Python error set, if there is no memory.
pybind11::object make(const int64_t* shape, int dimensions, dlpack::DataType dtype, bool poison, void*& data);

}  // namespace camkd::tensors
