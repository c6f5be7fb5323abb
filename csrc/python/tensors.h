// Tensors as Python objects: read and made by one C call each, where Python's way takes several through torch's
// argument parsers.
#pragma once

#include <pybind11/pybind11.h>

#include "dlpack.h"

namespace camkd::tensors {

// Takes over `torch.Tensor.__dlpack_c_exchange_api__` and the classes whose instances are nothing but tensors.
// False if this torch offers nothing that we understand; without a connection `look` takes nothing.
bool connect(pybind11::object api, pybind11::type tensor, pybind11::type parameter);

// Fills `out` with what a plain tensor in main memory holds, for as long as `object` lives; false for anything else.
bool look(PyObject* object, dlpack::Tensor& out);

bool requires_grad(PyObject* object);

// A contiguous tensor of uninitialised memory, of recycled pages (cpu/output_memory.h) when it is large, and where that
// lies; `poison` fills it with NaN. Throws std::bad_alloc, or pybind11::error_already_set.
pybind11::object make(const int64_t* shape, int dimensions, dlpack::DataType dtype, bool poison, void*& data);

}  // namespace camkd::tensors
