#include "readers.h"

#include "arguments.h"
#include "tensors.h"

namespace py = pybind11;
using namespace camkd::arguments;

namespace camkd::python {

bool Divisor::read(PyObject* name, PyObject* num_items) {
    const auto is = [&](const char* other) { return PyUnicode_CompareWithASCIIString(name, other) == 0; };
    if (!PyUnicode_CheckExact(name)) return false;
    if (is("mean")) {
        double divisor;
        counts = num_items == Py_None;
        if (counts) return true;
        if (!read_number(num_items, divisor) || divisor <= 0) return false;
        inverse = 1 / divisor;
        return true;
    }
    reduction = is("sum") ? Reduction::sum : Reduction::none;
    return num_items == Py_None && (reduction == Reduction::sum || is("none"));
}

bool Factor::read(PyObject* object, const dlpack::Device& device) {
    if (read_number(object, number)) return true;
    dlpack::Tensor tensor;
    if (!look_on(device, object, tensor) || !(tensor.dtype == dlpack::kFloat32)) return false;
    for (int i = 0; i < tensor.dimensions; ++i)
        if (tensor.shape[i] != 1) return false;
    number = 1;
    address = static_cast<const float*>(tensors::address(tensor));
    return true;
}

bool Items::read(PyObject* sequence) {
    const bool list = PyList_CheckExact(sequence);
    if (!list && !PyTuple_CheckExact(sequence)) return false;
    const Py_ssize_t K = list ? PyList_GET_SIZE(sequence) : PyTuple_GET_SIZE(sequence);
    if (K < 1 || K > kMaxTeachers) return false;
    count_ = int(K);
    for (Py_ssize_t k = 0; k < K; ++k)
        held_[k] =
            py::reinterpret_borrow<py::object>(list ? PyList_GET_ITEM(sequence, k) : PyTuple_GET_ITEM(sequence, k));
    return true;
}

bool same_shape(const dlpack::Tensor& a, const dlpack::Tensor& b, int dimensions) {
    for (int i = 0; i < dimensions; ++i)
        if (a.shape[i] != b.shape[i]) return false;
    return true;
}

bool is_contiguous(const dlpack::Tensor& tensor) {
    for (int64_t i = tensor.dimensions - 1, stride = 1; i >= 0; stride *= tensor.shape[i--])
        if (tensor.strides[i] != stride && tensor.shape[i] != 1) return false;
    return true;
}

bool matrix_of(const dlpack::Tensor& logits, Matrix& out) {
    const int last = logits.dimensions - 1;
    if (logits.strides[last] != 1 && logits.shape[last] != 1) return false;
    if (!tensors::dtype_of(logits, out.dtype)) return false;
    out.data = tensors::address(logits);
    out.stride_outer = logits.strides[0];
    out.stride_inner = logits.strides[last - 1];
    return true;
}

bool read_sizes(const dlpack::Tensor& logits, int64_t& N, int64_t& C, int64_t& S) {
    if (logits.dimensions != 2 && logits.dimensions != 3) return false;
    C = logits.shape[logits.dimensions - 1];
    S = logits.shape[logits.dimensions - 2];
    N = logits.dimensions == 2 ? S : logits.shape[0] * S;
    return N > 0 && C > 0;
}

bool look_on(const dlpack::Device& device, PyObject* object, dlpack::Tensor& out) {
    return tensors::look(object, out) && out.device == device;
}

bool read_labels(PyObject* object, const dlpack::Tensor& logits, dlpack::Tensor& out) {
    return look_on(logits.device, object, out) && out.dtype == dlpack::kInt64 &&
           out.dimensions == logits.dimensions - 1 && same_shape(out, logits, out.dimensions) && is_contiguous(out);
}

bool read_second(PyObject* object, const dlpack::Tensor& labels, SecondLabels& out) {
    if (object == Py_None) return true;
    if (!PyTuple_Check(object) || PyTuple_GET_SIZE(object) != 2) return false;
    const auto look_like = [&](PyObject* item, dlpack::DataType dtype, dlpack::Tensor& tensor) {
        return look_on(labels.device, item, tensor) && tensor.dtype == dtype &&
               tensor.dimensions == labels.dimensions && same_shape(tensor, labels, labels.dimensions) &&
               is_contiguous(tensor);
    };
    PyObject *const target = PyTuple_GET_ITEM(object, 0), *const mix = PyTuple_GET_ITEM(object, 1);
    dlpack::Tensor labels_of, shares;
    if (!look_like(target, dlpack::kInt64, labels_of) || !look_like(mix, dlpack::kFloat32, shares)) return false;
    out = {static_cast<const int64_t*>(tensors::address(labels_of)),
           static_cast<const float*>(tensors::address(shares))};
    return !tensors::requires_grad(mix);
}

}  // namespace camkd::python
