// The CUDA functions of the Python module. Launching takes microseconds, so the GIL is kept.

#include "../python/arguments.h"
#include "../python/module.h"
#include "api.h"

namespace camkd::cuda {
namespace {

using namespace camkd::arguments;

using Scale = std::tuple<float, uintptr_t>;  // a number, and the address of another factor or 0

void check_columns(int64_t C) {
    if (C > kMostColumns)
        throw std::invalid_argument("at most " + std::to_string(kMostColumns) + " columns, got " + std::to_string(C));
}

LaunchOptions options_of(uintptr_t stream, bool debug = false) {
    return {pointer<void>(stream), debug};
}

void py_row_loss(const Shape& shape, const std::vector<MatrixTuple>& streams, uintptr_t target, const Second& second,
                 const pybind11::object& formula, const Weights& weights, uintptr_t row_stats, uintptr_t grad_student,
                 float grad_scale, uintptr_t grad_scale_device, std::tuple<uintptr_t, uintptr_t> mean,
                 const ShardTuple& shard, bool debug, uintptr_t stream) {
    RowLossArgs args =
        row_loss_args(shape, streams, target, second, formula, weights, row_stats, grad_student, grad_scale, shard);
    check_columns(args.C);
    args.grad_scale_device = pointer<const float>(grad_scale_device);
    const auto [loss, others] = mean;
    args.batch = {nullptr, pointer<float>(loss), pointer<float>(others), loss != 0, 1};
    row_loss(args, options_of(stream, debug));
}

void py_scale_rows(int64_t N, int64_t C, uintptr_t grad, uintptr_t out, int dtype, uintptr_t factor,
                   int64_t factor_stride, uintptr_t stream) {
    scale_rows(scale_rows_args(N, C, grad, out, dtype, factor, factor_stride), options_of(stream));
}

void py_confidence_forward(const Shape& shape, const std::vector<MatrixTuple>& logits, uintptr_t target,
                           const Second& second, int64_t ignore_index, uintptr_t weights, uintptr_t ce, uintptr_t lse,
                           uintptr_t inverse_valid, bool debug, uintptr_t stream) {
    check_columns(std::get<1>(shape));
    ConfidenceArgs args = confidence_forward_args(shape, logits, target, second, ignore_index, weights, ce, lse);
    args.inverse_valid = pointer<float>(inverse_valid);
    confidence_forward(args, options_of(stream, debug));
}

void py_confidence_backward(const Shape& shape, const std::vector<MatrixTuple>& logits, uintptr_t target,
                            const Second& second, uintptr_t lse, uintptr_t grad_ce, const std::vector<uintptr_t>& grads,
                            uintptr_t stream) {
    check_columns(std::get<1>(shape));
    confidence_backward(confidence_backward_args(shape, logits, target, second, lse, grad_ce, grads),
                        options_of(stream));
}

void py_features(int64_t N, const std::vector<MapPair>& pairs, const Weights& weights, uintptr_t error, uintptr_t loss,
                 const std::vector<uintptr_t>& grads, const Scale& scale, const Scale& grad_scale, uintptr_t stream) {
    FeatureArgs args = feature_args(N, pairs, weights, error, loss, grads, std::get<0>(scale), std::get<0>(grad_scale));
    for (int k = 0; k < args.K; ++k) check_columns(values_of(args, k));
    args.scale_device = pointer<const float>(std::get<1>(scale));
    args.grad_scale_device = pointer<const float>(std::get<1>(grad_scale));
    features(args, options_of(stream));
}

}  // namespace

void add_bindings(pybind11::module_& m) {
    add_cuda_calls(m);
    add_cuda_features(m);
    m.def("cuda_batch_floats", [](int64_t N) { return batch_floats(N); });
    m.def("cuda_row_loss", &py_row_loss);
    m.def("cuda_try_geometry",
          [](int warps, int slots, int rows, int gradients) { try_geometry({warps, slots, rows, gradients}); });
    m.def("cuda_tried_geometry", [] {
        const RowGeometry g = tried_geometry();
        return pybind11::make_tuple(g.warp_per_row, g.pipelined, g.threads / kWarpThreads, g.slots, g.blocks_per_group,
                                    g.rows, g.gradients);
    });
    m.def("cuda_scale_rows", &py_scale_rows);
    m.def("cuda_confidence_forward", &py_confidence_forward);
    m.def("cuda_confidence_backward", &py_confidence_backward);
    m.def("cuda_features", &py_features);
}

}  // namespace camkd::cuda
