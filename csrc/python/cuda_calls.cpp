// The CUDA functions that take tensors themselves: each is one crossing from Python, with its checks, its outputs and
// the current stream. Input that they do not take, or that is invalid, is declined with None; the general path, in
// Python, then handles it or raises.
#include "module.h"

#include "arguments.h"
#include "fast_function.h"
#include "logit_call.h"
#include "on_device.h"
#include "tensors.h"

namespace py = pybind11;
using namespace camkd::python;

namespace camkd::cuda {
namespace {

enum { debug = device_options, argument_count };

// See camkd_fast/_C.pyi.
PyObject* logit_loss(PyObject*, PyObject* const* from, Py_ssize_t count) {
    if (!takes("cuda_logit_loss", argument_count, count)) return nullptr;
    return guarded([&]() -> PyObject* {
        LogitCall call;
        RowLossArgs& args = call.args;
        if (!call.read(from) || call.logits.device.type != kDevice || args.C > kMostColumns) Py_RETURN_NONE;
        const dlpack::Device device = call.logits.device;
        const OnDevice current(device);
        const auto make = [&](const int64_t* shape, int dimensions, dlpack::DataType dtype, auto*& data) {
            void* address = nullptr;
            py::object tensor = tensors::make_on(device, shape, dimensions, dtype, address);
            data = static_cast<std::remove_reference_t<decltype(data)>>(address);
            return tensor;
        };
        const bool rows = call.divisor.reduction == Reduction::none;
        const int64_t stats_shape[] = {row_stats::count(args.K, args.formula.entropy), args.N},
                      grad_shape[] = {args.N, args.C};
        const int64_t others_shape[] = {batch_floats(args.N)};
        BatchOutput& batch = args.batch;
        py::object stats = make(stats_shape, 2, dlpack::kFloat32, args.row_stats), grad_student = py::none();
        py::object loss = rows ? make(call.labels.shape, call.labels.dimensions, dlpack::kFloat32, batch.losses)
                               : make(nullptr, 0, dlpack::kFloat32, batch.loss);
        py::object others = rows ? py::none() : make(others_shape, 1, dlpack::kFloat32, batch.others);
        if (call.wants_grad) grad_student = make(grad_shape, 2, call.logits.dtype, args.grad_student);
        batch.counts = call.divisor.counts;
        batch.factor = float(call.divisor.inverse);
        args.grad_scale = float(call.divisor.inverse * call.scale.number);
        args.grad_scale_device = call.scale.address;
        row_loss(args, {tensors::current_stream(device), from[debug] == Py_True});
        const py::object means = rows ? py::object(py::none()) : py::make_tuple(loss, others);
        return whole_loss(loss, stats, grad_student, py::none(), means, py::none());
    });
}

// See camkd_fast/_C.pyi.
PyObject* scale(PyObject*, PyObject* const* from, Py_ssize_t count) {
    if (!takes("cuda_scale", 3, count)) return nullptr;
    return guarded([&]() -> PyObject* {
        dlpack::Tensor grad, factor, out;
        ScaleRowsArgs args{};
        for (auto [object, tensor] : {std::pair{from[0], &grad}, std::pair{from[1], &factor}, std::pair{from[2], &out}})
            if (!tensors::look(object, *tensor) || tensor->device.type != kDevice || !is_contiguous(*tensor))
                Py_RETURN_FALSE;
        if (grad.dimensions != 2 || out.dimensions != 2 || factor.dimensions != 1 ||
            !(factor.dtype == dlpack::kFloat32))
            Py_RETURN_FALSE;
        args.N = grad.shape[0];
        args.C = grad.shape[1];
        if (out.shape[0] != args.N || out.shape[1] != args.C || !(out.dtype == grad.dtype) || args.N == 0)
            Py_RETURN_FALSE;
        if ((factor.shape[0] != 1 && factor.shape[0] != args.N) || !(factor.device == grad.device) ||
            !(out.device == grad.device) || !tensors::dtype_of(grad, args.dtype))
            Py_RETURN_FALSE;
        args.grad = tensors::address(grad);
        args.out = tensors::address(out);
        args.factor = static_cast<const float*>(tensors::address(factor));
        args.factor_stride = factor.shape[0] == 1 ? 0 : 1;
        const OnDevice current(grad.device);
        scale_rows(args, {tensors::current_stream(grad.device), false});
        Py_RETURN_TRUE;
    });
}

PyMethodDef methods[] = {
    fast("cuda_logit_loss", logit_loss), fast("cuda_scale", scale), {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_cuda_calls(py::module_& m) {
    if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace camkd::cuda
