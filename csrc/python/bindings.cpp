// The Python module: addresses and sizes in, kernels called without the GIL. No maths and no framework header.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>
#include <vector>

#include "../cpu/api.h"
#include "../cpu/output_memory.h"
#include "../cpu/row_call.h"
#include "../cuda/bindings.h"
#include "arguments.h"
#include "cuda_build.h"  // made by cuda/cuda.cmake
#include "mean_loss.h"

namespace py = pybind11;
using namespace camkd;
using namespace camkd::cpu;
using namespace camkd::arguments;

namespace {

// Returns the sums of loss, hard and soft over the rows, added in order.
std::tuple<double, double, double> row_loss(int64_t N, int64_t C, int64_t inner, const MatrixTuple& student,
                                            const std::vector<MatrixTuple>& teachers, uintptr_t target,
                                            int64_t ignore_index, float temperature, float hard_weight,
                                            float soft_weight, int weighting,
                                            std::tuple<uintptr_t, int64_t, int64_t> weights, uintptr_t numbers,
                                            uintptr_t residual, float residual_scale, int threads) {
    RowLossArgs args{};
    args.N = N;
    args.C = C;
    args.inner = inner;
    args.student = matrix(student);
    args.K = fill(teachers, args.teachers);
    args.target = pointer<const int64_t>(target);
    args.ignore_index = ignore_index;
    args.formula = {temperature, hard_weight, soft_weight, static_cast<Weighting>(weighting)};
    args.weights = pointer<const float>(std::get<0>(weights));
    args.weight_stride_k = std::get<1>(weights);
    args.weight_stride_n = std::get<2>(weights);
    args.residual = pointer<void>(residual);
    args.residual_scale = residual_scale;
    args.threads = threads;
    py::gil_scoped_release release;
    const auto sums = run_row_loss(args, pointer<float>(numbers));
    return {sums[0], sums[1], sums[2]};
}

void scale_rows(int64_t N, int64_t C, uintptr_t residual, uintptr_t out, int dtype, uintptr_t factor,
                int64_t factor_stride, int threads) {
    ScaleRowsArgs args{N,
                       C,
                       pointer<const void>(residual),
                       pointer<void>(out),
                       static_cast<DType>(dtype),
                       pointer<const float>(factor),
                       factor_stride,
                       threads};
    py::gil_scoped_release release;
    kernels().scale_rows(args);
}

ConfidenceArgs confidence_args(int64_t N, int64_t C, int64_t inner, const std::vector<MatrixTuple>& logits,
                               uintptr_t target, int threads) {
    ConfidenceArgs args{};
    args.N = N;
    args.C = C;
    args.inner = inner;
    args.K = fill(logits, args.logits);
    args.target = pointer<const int64_t>(target);
    args.threads = threads;
    return args;
}

void confidence_forward(int64_t N, int64_t C, int64_t inner, const std::vector<MatrixTuple>& logits, uintptr_t target,
                        int64_t ignore_index, uintptr_t weights, uintptr_t ce, uintptr_t lse, int threads) {
    ConfidenceArgs args = confidence_args(N, C, inner, logits, target, threads);
    args.ignore_index = ignore_index;
    args.weights = pointer<float>(weights);
    args.ce = pointer<float>(ce);
    args.lse = pointer<float>(lse);
    py::gil_scoped_release release;
    kernels().confidence_forward(args);
}

void confidence_backward(int64_t N, int64_t C, int64_t inner, const std::vector<MatrixTuple>& logits, uintptr_t target,
                         uintptr_t lse, uintptr_t grad_ce, const std::vector<uintptr_t>& grads, int threads) {
    ConfidenceArgs args = confidence_args(N, C, inner, logits, target, threads);
    args.lse = pointer<float>(lse);
    args.grad_ce = pointer<const float>(grad_ce);
    for (int k = 0; k < args.K; ++k) args.grads[k] = pointer<void>(grads.at(k));
    py::gil_scoped_release release;
    kernels().confidence_backward(args);
}

void feature_forward(int64_t N, int64_t M, const MatrixTuple& student, const MatrixTuple& teacher, uintptr_t error,
                     int threads) {
    FeatureArgs args{N, M, matrix(student), matrix(teacher), pointer<float>(error), nullptr, nullptr, threads};
    py::gil_scoped_release release;
    kernels().feature_forward(args);
}

void feature_backward(int64_t N, int64_t M, const MatrixTuple& student, const MatrixTuple& teacher,
                      uintptr_t grad_error, uintptr_t grad, int threads) {
    FeatureArgs args{
        N,      M, matrix(student), matrix(teacher), nullptr, pointer<const float>(grad_error), pointer<void>(grad),
        threads};
    py::gil_scoped_release release;
    kernels().feature_backward(args);
}

// (labels that are not ignore_index, whether one of them is outside [0, C), that label)
std::tuple<int64_t, bool, int64_t> label_counts(uintptr_t target, int64_t N, int64_t C, int64_t ignore_index) {
    const Labels labels = count_labels(pointer<const int64_t>(target), N, C, ignore_index);
    return {labels.valid, labels.offends, labels.offender};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled kernels of camkd_fast; called by camkd_fast.native and camkd_fast.cuda_kernels only.";
    python::add_mean_loss(m);
    m.def("row_loss", &row_loss);
    m.def("scale_rows", &scale_rows);
    m.def("confidence_forward", &confidence_forward);
    m.def("confidence_backward", &confidence_backward);
    m.def("feature_forward", &feature_forward);
    m.def("feature_backward", &feature_backward);
    m.def("count_labels", &label_counts);
    m.def("instruction_set", [] { return kernels().name; });
    m.attr("RECYCLED_BYTES") = kRecycledBytes;
    py::class_<OutputMemory>(m, "OutputMemory", py::buffer_protocol())
        .def(py::init<size_t>())
        .def_buffer([](OutputMemory& memory) {
            return py::buffer_info(static_cast<uint8_t*>(memory.data()), py::ssize_t(memory.bytes()));
        });
    // (whether there are CUDA kernels, their architectures or why there are none)
    m.def("cuda_build", [] { return std::make_pair(bool(CAMKD_CUDA), CAMKD_CUDA_BUILD); });
#if CAMKD_CUDA
    camkd::cuda::add_bindings(m);
#endif
}
