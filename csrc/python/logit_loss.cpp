// The logit loss of CPU tensors in one crossing from Python.
#include "module.h"

#include "../cpu/row_call.h"
#include "arguments.h"
#include "fast_function.h"
#include "logit_call.h"
#include "tensors.h"

namespace py = pybind11;
using namespace camkd::cpu;

namespace camkd::python {
namespace {

enum { threads = device_options, poison, argument_count };

// See camkd_fast/_C.pyi.
PyObject* logit_loss(PyObject*, PyObject* const* from, Py_ssize_t count) {
    if (!takes("logit_loss", argument_count, count)) return nullptr;
    return guarded([&]() -> PyObject* {
        LogitCall call;
        RowLossArgs& args = call.args;
        int64_t max_threads = 1;
        if (!call.read(from) || !tensors::in_main_memory(call.logits)) Py_RETURN_NONE;
        if (!arguments::read_integer(from[threads], max_threads)) Py_RETURN_NONE;
        const LabelCount found = count_labels(args.target, args.second, args.N, args.C, args.formula.ignore_index);
        if (found.invalid >= 0) Py_RETURN_NONE;
        const double inverse = call.divisor.inverse_of(found.valid);
        args.grad_scale = float(inverse * call.scale.on_host());

        const bool fill = from[poison] == Py_True, rows = call.divisor.reduction == Reduction::none;
        const int64_t stats_shape[] = {row_stats::count(args.K, args.formula.entropy), args.N},
                      grad_shape[] = {args.N, args.C};
        void *loss_data = nullptr, *stats_data = nullptr;
        py::object stats = tensors::make(stats_shape, 2, dlpack::kFloat32, fill, stats_data);
        py::object loss =
            tensors::make(call.labels.shape, rows ? call.labels.dimensions : 0, dlpack::kFloat32, fill, loss_data);
        py::object grad_student = py::none();
        if (call.wants_grad) grad_student = tensors::make(grad_shape, 2, call.logits.dtype, fill, args.grad_student);
        args.row_stats = static_cast<float*>(stats_data);
        std::array<double, 3> sums;
        {
            py::gil_scoped_release release;
            sums = run_row_loss(args, int(max_threads));
        }
        auto* const losses = static_cast<float*>(loss_data);
        if (rows)
            std::copy_n(args.row_stats + row_stats::loss * args.N, args.N, losses);
        else
            *losses = float(sums[0] * inverse);
        return whole_loss(loss, stats, grad_student, py::make_tuple(sums[0], sums[1], sums[2]), py::none(),
                          rows ? py::object(py::none()) : py::float_(inverse));
    });
}

// See camkd_fast/_C.pyi.
PyObject* are_dense(PyObject*, PyObject* const* from, Py_ssize_t count) {
    dlpack::Tensor tensor;
    for (Py_ssize_t i = 0; i < count; ++i)
        if (!tensors::look(from[i], tensor)) Py_RETURN_FALSE;
    Py_RETURN_TRUE;
}

PyMethodDef methods[] = {fast("are_dense", are_dense), fast("logit_loss", logit_loss), {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_logit_loss(py::module_& m) {
    if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
    m.def("connect_tensors", &tensors::connect);
}

}  // namespace camkd::python
