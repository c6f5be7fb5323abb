// Reads and makes tensors, as Python objects, with one C call each. In Python this takes several calls through torch's
// argument parsers.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "../contract.h"
#include "dlpack.h"

namespace camkd::tensors {

// Keeps `torch.Tensor.__dlpack_c_exchange_api__` and the two classes whose instances `look` accepts. Returns false if
// this torch has no compatible version; `look` then accepts nothing.
bool connect(pybind11::object api, pybind11::type tensor, pybind11::type parameter);

// Describes a dense tensor in `out`, valid while `object` lives. Returns false for anything whose memory does not hold
// its values as they are: other classes, other layouts, wrappers, lazy negation, freed storage
// (camkd_fast.backends.memory).
bool look(PyObject* object, dlpack::Tensor& out);

inline bool in_main_memory(const dlpack::Tensor& tensor) {
    return tensor.device.type == dlpack::DeviceType::cpu;
}

inline void* address(const dlpack::Tensor& tensor) {
    return static_cast<char*>(tensor.data) + tensor.byte_offset;
}

bool requires_grad(PyObject* object);

// The kernels' code of a tensor's dtype; false for one that they do not take.
bool dtype_of(const dlpack::Tensor& tensor, DType& out);

// A contiguous CPU tensor, uninitialised or filled with NaN (`poison`), whose address is stored in `data`. Large ones
// use recycled pages (cpu/output_memory.h). Throws std::bad_alloc or pybind11::error_already_set.
pybind11::object make(const int64_t* shape, int dimensions, dlpack::DataType dtype, bool poison, void*& data);

// A contiguous tensor by torch's allocator, whose address is stored in `data`. Throws pybind11::error_already_set.
pybind11::object make_on(const dlpack::Device& device, const int64_t* shape, int dimensions, dlpack::DataType dtype,
                         void*& data);

// Uninitialised memory that tensors share.
struct Memory {
    std::shared_ptr<void> owner;
    char* data;
    dlpack::Device device;
};

// As `make` and `make_on`. Throw likewise.
Memory allocate(size_t bytes, bool poison);
Memory allocate_on(const dlpack::Device& device, int64_t elements, dlpack::DataType dtype);

// Most dimensions of a tensor made here.
constexpr int kMostDimensions = 6;

// A tensor at the beginning of shared memory. Throws pybind11::error_already_set.
pybind11::object make_in(const Memory& memory, const int64_t* shape, const int64_t* strides, int dimensions,
                         dlpack::DataType dtype);

// torch's current stream on a device. Throws pybind11::error_already_set.
void* current_stream(const dlpack::Device& device);

}  // namespace camkd::tensors
