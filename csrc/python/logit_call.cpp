#include "logit_call.h"

#include "arguments.h"
#include "tensors.h"

namespace py = pybind11;
using namespace camkd::arguments;

namespace camkd::python {
namespace {

bool same_shape(const dlpack::Tensor& a, const dlpack::Tensor& b, int dimensions) {
    for (int i = 0; i < dimensions; ++i)
        if (a.shape[i] != b.shape[i]) return false;
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

}  // namespace

bool LogitCall::read(PyObject* const* from) {
    if (!read_student(from[student]) || !read_teachers(from[teachers]) || !read_labels(from[target])) return false;
    if (!read_formula(from[formula], args.formula) || args.formula.weighting == Weighting::given) return false;
    if (!read_reduction(from[reduction], from[num_items]) || !read_scale(from[loss_scale])) return false;
    const bool finished = from[loss_scale] != Py_None;  // and not left to backward
    // Divided by N in the kernel, gradients of float16 could underflow.
    if (args.streams[0].dtype == DType::f16 && reduced == Reduction::mean && !finished) return false;
    wants_grad = finished || (from[grad_enabled] == Py_True && tensors::requires_grad(from[student]));
    return true;
}

// (N, C) or (B, S, C).
bool LogitCall::read_student(PyObject* object) {
    if (!tensors::look(object, logits)) return false;
    if (logits.dimensions != 2 && logits.dimensions != 3) return false;
    args.C = logits.shape[logits.dimensions - 1];
    args.S = logits.shape[logits.dimensions - 2];
    args.N = logits.dimensions == 2 ? args.S : logits.shape[0] * args.S;
    return args.N > 0 && args.C > 0 && matrix_of(logits, args.streams[0]);
}

bool LogitCall::read_teachers(PyObject* sequence) {
    const bool list = PyList_CheckExact(sequence);
    if (!list && !PyTuple_CheckExact(sequence)) return false;
    const Py_ssize_t K = list ? PyList_GET_SIZE(sequence) : PyTuple_GET_SIZE(sequence);
    if (K < 1 || K > kMaxTeachers) return false;
    args.K = int(K);
    for (Py_ssize_t k = 0; k < K; ++k) {
        PyObject* const teacher = list ? PyList_GET_ITEM(sequence, k) : PyTuple_GET_ITEM(sequence, k);
        held_[k] = py::reinterpret_borrow<py::object>(teacher);
        dlpack::Tensor theirs;
        if (!look_beside_student(teacher, theirs) || theirs.dimensions != logits.dimensions ||
            !same_shape(theirs, logits, logits.dimensions) || !matrix_of(theirs, args.streams[k + 1]) ||
            tensors::requires_grad(teacher))
            return false;
    }
    return true;
}

// Contiguous int64 in the student's leading shape.
bool LogitCall::read_labels(PyObject* object) {
    if (!look_beside_student(object, labels) || !(labels.dtype == dlpack::kInt64)) return false;
    if (labels.dimensions != logits.dimensions - 1 || !same_shape(labels, logits, labels.dimensions)) return false;
    for (int64_t i = labels.dimensions - 1, stride = 1; i >= 0; stride *= labels.shape[i--])
        if (labels.strides[i] != stride && labels.shape[i] != 1) return false;
    args.target = static_cast<const int64_t*>(tensors::address(labels));
    return true;
}

bool LogitCall::read_reduction(PyObject* name, PyObject* items) {
    const auto is = [&](const char* other) { return PyUnicode_CompareWithASCIIString(name, other) == 0; };
    if (!PyUnicode_CheckExact(name)) return false;
    if (is("mean")) {
        double divisor;
        counts = items == Py_None;
        if (counts) return true;
        if (!read_number(items, divisor) || divisor <= 0) return false;
        inverse = 1 / divisor;
        return true;
    }
    reduced = is("sum") ? Reduction::sum : Reduction::none;
    return items == Py_None && (reduced == Reduction::sum || is("none"));
}

bool LogitCall::read_scale(PyObject* object) {
    if (object == Py_None || read_number(object, scale)) return true;
    dlpack::Tensor tensor;
    if (!look_beside_student(object, tensor) || !(tensor.dtype == dlpack::kFloat32)) return false;
    for (int i = 0; i < tensor.dimensions; ++i)
        if (tensor.shape[i] != 1) return false;
    scale_at = static_cast<const float*>(tensors::address(tensor));
    return true;
}

bool LogitCall::look_beside_student(PyObject* object, dlpack::Tensor& out) const {
    return tensors::look(object, out) && out.device == logits.device;
}

}  // namespace camkd::python
