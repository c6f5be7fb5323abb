#include "tensors.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "../cpu/output_memory.h"

namespace py = pybind11;

namespace camkd::tensors {
namespace {

constexpr size_t kAlignment = 64;

struct Connection {
    dlpack::ExchangeApi* api = nullptr;
    PyObject *tensor = nullptr, *parameter = nullptr, *requires_grad = nullptr;  // never released, like the methods:
    PyObject *is_neg = nullptr, *storage_offset = nullptr;
};
Connection connection;

// The owner of a tensor made here. Small data directly follows this struct, large data is in `pages`.
struct alignas(kAlignment) Made {
    dlpack::ManagedTensor managed;
    int64_t shape[kMostDimensions], strides[kMostDimensions];
    std::unique_ptr<cpu::OutputMemory> pages;

    static Made* create(size_t bytes) {
        const bool large = bytes >= cpu::kRecycledBytes;
        void* block = ::operator new(sizeof(Made) + (large ? 0 : bytes), std::align_val_t(kAlignment));
        Made* made = new (block) Made();
        try {
            if (large) made->pages = std::make_unique<cpu::OutputMemory>(bytes);
        } catch (...) {
            made->destroy();
            throw;
        }
        return made;
    }
    void destroy() {
        this->~Made();
        ::operator delete(static_cast<void*>(this), std::align_val_t(kAlignment));
    }
    void* data() { return pages ? pages->data() : static_cast<void*>(this + 1); }
};

// The owner of a tensor in shared memory.
struct Part {
    dlpack::ManagedTensor managed;
    int64_t shape[kMostDimensions], strides[kMostDimensions];
    std::shared_ptr<void> memory;
};

// Takes ownership.
py::object given(dlpack::ManagedTensor* managed) {
    void* object = nullptr;
    if (connection.api->give(managed, &object) != 0) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
}

dlpack::ManagedTensor* allocated(const dlpack::Device& device, const int64_t* shape, int dimensions,
                                 dlpack::DataType dtype) {
    dlpack::Tensor like{nullptr, device, dimensions, dtype, const_cast<int64_t*>(shape), nullptr, 0};
    dlpack::ManagedTensor* made = nullptr;
    const auto raise = [](void*, const char* kind, const char* message) {
        PyErr_Format(PyExc_RuntimeError, "%s: %s", kind, message);
    };
    if (connection.api->allocate(&like, &made, nullptr, raise) != 0) throw py::error_already_set();
    return made;
}

bool is_empty(const dlpack::Tensor& tensor) {
    for (int i = 0; i < tensor.dimensions; ++i)
        if (tensor.shape[i] == 0) return true;
    return false;
}

PyObject* call(PyObject* method, PyObject* object) {
    return PyObject_Vectorcall(method, &object, 1, nullptr);
}

// False for freed storage and for wrappers, whose storage is null: then the address is that of the offset. An address
// beyond 1 TB is no offset, which saves the question on most systems.
bool has_memory(PyObject* object, const dlpack::Tensor& tensor) {
    const auto address = reinterpret_cast<uintptr_t>(tensor.data);
    if (address >> 40) return true;
    PyObject* offset = call(connection.storage_offset, object);
    const int64_t elements = offset ? PyLong_AsLongLong(offset) : -1;
    Py_XDECREF(offset);
    if (PyErr_Occurred()) PyErr_Clear();
    return elements >= 0 && address != uintptr_t(elements) * (tensor.dtype.bits / 8);
}

// Takes a reference to an answer, or null with an error set.
bool is_false(PyObject* answer) {
    if (!answer) PyErr_Clear();
    const bool found = answer == Py_False;
    Py_XDECREF(answer);
    return found;
}

}  // namespace

bool connect(py::object api, py::type tensor, py::type parameter) {
    if (!PyCapsule_IsValid(api.ptr(), "dlpack_exchange_api")) return false;
    auto* found = static_cast<dlpack::ExchangeApi*>(PyCapsule_GetPointer(api.ptr(), "dlpack_exchange_api"));
    while (found && found->version.major > 1) found = found->older;
    if (!found || found->version.major != 1 || !found->look || !found->give || !found->allocate || !found->stream)
        return false;
    py::object is_neg = tensor.attr("is_neg"), storage_offset = tensor.attr("storage_offset");
    connection = {found,
                  tensor.release().ptr(),
                  parameter.release().ptr(),
                  PyUnicode_InternFromString("requires_grad"),
                  is_neg.release().ptr(),
                  storage_offset.release().ptr()};
    api.release();
    return true;
}

bool look(PyObject* object, dlpack::Tensor& out) {
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    if (type != connection.tensor && type != connection.parameter) return false;
    if (connection.api->look(object, &out) != 0) {
        PyErr_Clear();  // a tensor without memory, such as a torch.func wrapper
        return false;
    }
    // DLPack ignores lazy negation.
    return (is_empty(out) || has_memory(object, out)) && is_false(call(connection.is_neg, object));
}

bool requires_grad(PyObject* object) {
    return !is_false(PyObject_GetAttr(object, connection.requires_grad));
}

bool dtype_of(const dlpack::Tensor& tensor, DType& out) {
    if (tensor.dtype == dlpack::kFloat32)
        out = DType::f32;
    else if (tensor.dtype == dlpack::kBFloat16)
        out = DType::bf16;
    else if (tensor.dtype == dlpack::kFloat16)
        out = DType::f16;
    else
        return false;
    return true;
}

py::object make(const int64_t* shape, int dimensions, dlpack::DataType dtype, bool poison, void*& data) {
    int64_t elements = 1;
    for (int i = 0; i < dimensions; ++i) elements *= shape[i];
    const size_t bytes = size_t(elements) * (dtype.bits / 8);
    Made* made = Made::create(bytes);
    for (int64_t i = dimensions - 1, stride = 1; i >= 0; stride *= shape[i--]) {
        made->shape[i] = shape[i];
        made->strides[i] = stride;
    }
    data = made->data();
    if (poison) std::memset(data, 0xff, bytes);
    made->managed = {{1, 0},
                     made,
                     [](dlpack::ManagedTensor* self) { static_cast<Made*>(self->context)->destroy(); },
                     0,
                     {data, {dlpack::DeviceType::cpu, 0}, dimensions, dtype, made->shape, made->strides, 0}};
    return given(&made->managed);
}

py::object make_on(const dlpack::Device& device, const int64_t* shape, int dimensions, dlpack::DataType dtype,
                   void*& data) {
    dlpack::ManagedTensor* const made = allocated(device, shape, dimensions, dtype);
    data = address(made->tensor);
    return given(made);
}

Memory allocate(size_t bytes, bool poison) {
    Memory memory{nullptr, nullptr, {dlpack::DeviceType::cpu, 0}};
    if (bytes >= cpu::kRecycledBytes) {
        const auto pages = std::make_shared<cpu::OutputMemory>(bytes);
        memory.data = static_cast<char*>(pages->data());
        memory.owner = pages;
    } else {
        const auto release = [](void* block) { ::operator delete(block, std::align_val_t(kAlignment)); };
        memory.owner.reset(::operator new(bytes, std::align_val_t(kAlignment)), release);
        memory.data = static_cast<char*>(memory.owner.get());
    }
    if (poison) std::memset(memory.data, 0xff, bytes);
    return memory;
}

Memory allocate_on(const dlpack::Device& device, int64_t elements, dlpack::DataType dtype) {
    const std::shared_ptr<dlpack::ManagedTensor> made(allocated(device, &elements, 1, dtype),
                                                      [](dlpack::ManagedTensor* self) { self->deleter(self); });
    return {made, static_cast<char*>(address(made->tensor)), device};
}

py::object make_in(const Memory& memory, const int64_t* shape, const int64_t* strides, int dimensions,
                   dlpack::DataType dtype) {
    Part* const part = new Part{{}, {}, {}, memory.owner};
    std::copy_n(shape, dimensions, part->shape);
    std::copy_n(strides, dimensions, part->strides);
    part->managed = {{1, 0},
                     part,
                     [](dlpack::ManagedTensor* self) { delete static_cast<Part*>(self->context); },
                     0,
                     {memory.data, memory.device, dimensions, dtype, part->shape, part->strides, 0}};
    return given(&part->managed);
}

void* current_stream(const dlpack::Device& device) {
    void* stream = nullptr;
    if (connection.api->stream(device.type, device.index, &stream) != 0) throw py::error_already_set();
    return stream;
}

}  // namespace camkd::tensors
