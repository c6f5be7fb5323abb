// The CUDA functions of the Python module: addresses, sizes and a stream in, kernels launched on the current device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "../python/arguments.h"
#include "api.h"
#include "bindings.h"

namespace camkd::cuda {
namespace {

using namespace camkd::arguments;

// Kernels count the columns of a row in 32 bits, with room for the last vector; rows and elements in 64.
int columns(int64_t C) {
    constexpr int64_t most = std::numeric_limits<int>::max() - 64 * 1024;
    if (C > most) throw std::invalid_argument("at most " + std::to_string(most) + " columns, got " + std::to_string(C));
    return int(C);
}

Stream stream_of(uintptr_t address) {
    return pointer<void>(address);
}

void py_row_loss(int64_t N, int64_t C, int64_t inner, const std::vector<MatrixTuple>& streams, uintptr_t target,
                 int64_t ignore_index, float temperature, float hard_weight, float soft_weight, int weighting,
                 std::tuple<uintptr_t, int64_t, int64_t> weights, uintptr_t numbers, uintptr_t residual,
                 float residual_scale, uintptr_t residual_factor, std::tuple<uintptr_t, uintptr_t> mean, bool debug,
                 uintptr_t stream) {
    RowLossArgs args{};
    args.N = N;
    args.C = columns(C);
    args.inner = inner;
    args.streams[0] = matrix(streams.at(0));
    args.K = fill({streams.begin() + 1, streams.end()}, args.streams + 1);
    args.target = pointer<const int64_t>(target);
    args.ignore_index = ignore_index;
    args.formula = {temperature, hard_weight, soft_weight, static_cast<Weighting>(weighting)};
    args.weights = pointer<const float>(std::get<0>(weights));
    args.weight_stride_k = std::get<1>(weights);
    args.weight_stride_n = std::get<2>(weights);
    args.numbers = pointer<float>(numbers);
    args.residual = pointer<void>(residual);
    args.residual_scale = residual_scale;
    args.residual_factor = pointer<const float>(residual_factor);
    args.mean = {pointer<float>(std::get<0>(mean)), pointer<float>(std::get<1>(mean))};
    args.debug = debug;
    row_loss(args, stream_of(stream));
}

void py_scale_rows(int64_t N, int64_t C, uintptr_t residual, uintptr_t out, int dtype, uintptr_t factor,
                   int64_t factor_stride, uintptr_t stream) {
    const ScaleRowsArgs args{N,
                             columns(C),
                             pointer<const void>(residual),
                             pointer<void>(out),
                             static_cast<DType>(dtype),
                             pointer<const float>(factor),
                             factor_stride};
    scale_rows(args, stream_of(stream));
}

ConfidenceArgs confidence_args(int64_t N, int64_t C, int64_t inner, const std::vector<MatrixTuple>& logits,
                               uintptr_t target) {
    ConfidenceArgs args{};
    args.N = N;
    args.C = columns(C);
    args.inner = inner;
    args.K = fill(logits, args.logits);
    args.target = pointer<const int64_t>(target);
    return args;
}

void py_confidence_forward(int64_t N, int64_t C, int64_t inner, const std::vector<MatrixTuple>& logits,
                           uintptr_t target, int64_t ignore_index, uintptr_t weights, uintptr_t ce, uintptr_t lse,
                           bool debug, uintptr_t stream) {
    ConfidenceArgs args = confidence_args(N, C, inner, logits, target);
    args.ignore_index = ignore_index;
    args.weights = pointer<float>(weights);
    args.ce = pointer<float>(ce);
    args.lse = pointer<float>(lse);
    args.debug = debug;
    confidence_forward(args, stream_of(stream));
}

void py_confidence_backward(int64_t N, int64_t C, int64_t inner, const std::vector<MatrixTuple>& logits,
                            uintptr_t target, uintptr_t lse, uintptr_t grad_ce, const std::vector<uintptr_t>& grads,
                            uintptr_t stream) {
    ConfidenceArgs args = confidence_args(N, C, inner, logits, target);
    args.lse = pointer<float>(lse);
    args.grad_ce = pointer<const float>(grad_ce);
    for (int k = 0; k < args.K; ++k) args.grads[k] = pointer<void>(grads.at(k));
    confidence_backward(args, stream_of(stream));
}

FeatureArgs feature_args(int64_t N, const std::vector<int64_t>& M, const std::vector<MatrixTuple>& student,
                         const std::vector<MatrixTuple>& teacher) {
    FeatureArgs args{};
    args.N = N;
    args.K = fill(student, args.student);
    fill(teacher, args.teacher);
    for (int k = 0; k < args.K; ++k) args.M[k] = columns(M.at(k));
    return args;
}

void py_feature_forward(int64_t N, const std::vector<int64_t>& M, const std::vector<MatrixTuple>& student,
                        const std::vector<MatrixTuple>& teacher, uintptr_t error, uintptr_t stream) {
    FeatureArgs args = feature_args(N, M, student, teacher);
    args.error = pointer<float>(error);
    feature_forward(args, stream_of(stream));
}

void py_feature_backward(int64_t N, const std::vector<int64_t>& M, const std::vector<MatrixTuple>& student,
                         const std::vector<MatrixTuple>& teacher, uintptr_t grad_error,
                         const std::vector<uintptr_t>& grads, uintptr_t stream) {
    FeatureArgs args = feature_args(N, M, student, teacher);
    args.grad_error = pointer<const float>(grad_error);
    for (int k = 0; k < args.K; ++k) args.grads[k] = pointer<void>(grads.at(k));
    feature_backward(args, stream_of(stream));
}

}  // namespace

void add_bindings(pybind11::module_& m) {
    // Launching takes microseconds: the GIL is kept.
    m.def("cuda_row_loss", &py_row_loss);
    m.def("cuda_scale_rows", &py_scale_rows);
    m.def("cuda_confidence_forward", &py_confidence_forward);
    m.def("cuda_confidence_backward", &py_confidence_backward);
    m.def("cuda_feature_forward", &py_feature_forward);
    m.def("cuda_feature_backward", &py_feature_backward);
}

}  // namespace camkd::cuda
