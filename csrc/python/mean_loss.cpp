// Fast path for the common call of the logit loss, in one crossing from Python. In Python, checks, allocations and
// reductions cost as much as the kernel at C = 100, and several times that after other work, when their code has left
// the cache. Unsupported or invalid input is declined with None; the general path, in Python, then handles it or
// raises.
#include "mean_loss.h"

#include <cmath>
#include <new>

#include "../cpu/row_call.h"
#include "arguments.h"
#include "tensors.h"

namespace py = pybind11;
using namespace camkd::cpu;
using namespace camkd::arguments;

namespace camkd::python {
namespace {

// The arguments by position.
enum Argument { student, teachers, target, formula, loss_scale, grad_enabled, threads, poison, argument_count };

bool same_shape(const dlpack::Tensor& a, const dlpack::Tensor& b, int dimensions) {
    for (int i = 0; i < dimensions; ++i)
        if (a.shape[i] != b.shape[i]) return false;
    return true;
}

bool matrix_of(const dlpack::Tensor& logits, Matrix& out) {
    const int last = logits.dimensions - 1;
    if (logits.strides[last] != 1 && logits.shape[last] != 1) return false;
    if (logits.dtype == dlpack::kFloat32)
        out.dtype = DType::f32;
    else if (logits.dtype == dlpack::kBFloat16)
        out.dtype = DType::bf16;
    else if (logits.dtype == dlpack::kFloat16)
        out.dtype = DType::f16;
    else
        return false;
    out.data = static_cast<const char*>(logits.data) + logits.byte_offset;
    out.stride_outer = logits.strides[0];
    out.stride_inner = logits.strides[last - 1];
    return true;
}

// The arguments of a call, and references that keep its tensors alive.
struct MeanLossCall {
    RowLossArgs args{};
    int64_t max_threads = 1;
    dlpack::Tensor student_logits, labels;
    py::object held[kMaxTeachers];

    // False for anything that the general path must handle.
    bool read(PyObject* const* from) {
        return tensors::look(from[student], student_logits) && tensors::in_main_memory(student_logits) &&
               read_student() && read_teachers(from[teachers]) && read_labels(from[target]) &&
               read_formula(from[formula], args.formula) && args.formula.weighting != Weighting::given &&
               read_integer(from[threads], max_threads);
    }

    // (N, C) or (B, S, C). Not float16: scaled by 1/N in the kernel its gradients could underflow.
    bool read_student() {
        const dlpack::Tensor& s = student_logits;
        if (s.dimensions != 2 && s.dimensions != 3) return false;
        args.C = s.shape[s.dimensions - 1];
        args.S = s.shape[s.dimensions - 2];
        args.N = s.dimensions == 2 ? args.S : s.shape[0] * args.S;
        return args.N > 0 && args.C > 0 && matrix_of(s, args.streams[0]) && args.streams[0].dtype != DType::f16;
    }

    bool read_teachers(PyObject* sequence) {
        const bool list = PyList_CheckExact(sequence);
        if (!list && !PyTuple_CheckExact(sequence)) return false;
        const Py_ssize_t K = list ? PyList_GET_SIZE(sequence) : PyTuple_GET_SIZE(sequence);
        if (K < 1 || K > kMaxTeachers) return false;
        args.K = int(K);
        for (Py_ssize_t k = 0; k < K; ++k) {
            held[k] =
                py::reinterpret_borrow<py::object>(list ? PyList_GET_ITEM(sequence, k) : PyTuple_GET_ITEM(sequence, k));
            dlpack::Tensor logits;
            if (!tensors::look(held[k].ptr(), logits) || !tensors::in_main_memory(logits) ||
                logits.dimensions != student_logits.dimensions ||
                !same_shape(logits, student_logits, logits.dimensions) || !matrix_of(logits, args.streams[k + 1]) ||
                tensors::requires_grad(held[k].ptr()))
                return false;
        }
        return true;
    }

    // Contiguous int64 in the student's leading shape.
    bool read_labels(PyObject* object) {
        if (!tensors::look(object, labels) || !tensors::in_main_memory(labels) || !(labels.dtype == dlpack::kInt64))
            return false;
        if (labels.dimensions != student_logits.dimensions - 1) return false;
        if (!same_shape(labels, student_logits, labels.dimensions)) return false;
        for (int64_t i = labels.dimensions - 1, stride = 1; i >= 0; stride *= labels.shape[i--])
            if (labels.strides[i] != stride && labels.shape[i] != 1) return false;
        args.target = reinterpret_cast<const int64_t*>(static_cast<const char*>(labels.data) + labels.byte_offset);
        return true;
    }
};

// See camkd_fast/_C.pyi. A function of the C API, because pybind11's conversions cost as much as the rest.
PyObject* mean_loss(PyObject*, PyObject* const* from, Py_ssize_t count) {
    if (count != argument_count) {
        PyErr_Format(PyExc_TypeError, "mean_loss takes %d arguments, got %zd", int(argument_count), count);
        return nullptr;
    }
    try {
        MeanLossCall call;
        RowLossArgs& args = call.args;
        double scale = 1;
        if (from[loss_scale] != Py_None && !read_number(from[loss_scale], scale)) Py_RETURN_NONE;
        if (!call.read(from)) Py_RETURN_NONE;
        const Labels found = count_labels(args.target, args.N, args.C, args.formula.ignore_index);
        if (found.has_invalid) Py_RETURN_NONE;
        const double inverse = 1.0 / double(found.valid > 0 ? found.valid : 1);
        args.grad_scale = float(inverse * scale);

        const bool fill = from[poison] == Py_True;
        const int64_t stats_shape[] = {row_stats::count(args.K), args.N}, grad_shape[] = {args.N, args.C};
        void *loss_data = nullptr, *stats_data = nullptr;
        py::object stats = tensors::make(stats_shape, 2, dlpack::kFloat32, fill, stats_data);
        py::object loss = tensors::make(nullptr, 0, dlpack::kFloat32, fill, loss_data), grad_student = py::none();
        if (from[loss_scale] != Py_None || (from[grad_enabled] == Py_True && tensors::requires_grad(from[student])))
            grad_student = tensors::make(grad_shape, 2, call.student_logits.dtype, fill, args.grad_student);
        args.row_stats = static_cast<float*>(stats_data);
        std::array<double, 3> sums;
        {
            py::gil_scoped_release release;
            sums = run_row_loss(args, int(call.max_threads));
        }
        *static_cast<float*>(loss_data) = float(sums[0] * inverse);
        return Py_BuildValue("(NNN(ddd)d)", loss.release().ptr(), stats.release().ptr(), grad_student.release().ptr(),
                             sums[0], sums[1], sums[2], inverse);
    } catch (py::error_already_set& error) {
        error.restore();
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
}

// See camkd_fast/_C.pyi.
PyObject* are_dense(PyObject*, PyObject* const* from, Py_ssize_t count) {
    dlpack::Tensor tensor;
    for (Py_ssize_t i = 0; i < count; ++i)
        if (!tensors::look(from[i], tensor)) Py_RETURN_FALSE;
    Py_RETURN_TRUE;
}

PyCFunction fast(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {{"are_dense", fast(are_dense), METH_FASTCALL, nullptr},
                         {"mean_loss", fast(mean_loss), METH_FASTCALL, nullptr},
                         {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_mean_loss(py::module_& m) {
    if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
    m.def("connect_tensors", &tensors::connect);
}

}  // namespace camkd::python
