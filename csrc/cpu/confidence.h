// Confidence weights of K sets of logits on a CPU: cross-entropies at T = 1 forward, softmax - onehot backward. Rows
// run in parallel.
#pragma once

#include "row_blocks.h"

namespace camkd::cpu {
namespace {

template <class T>
float exp_sum(const T* z, int n, float reference, const Exp& exp) {
    const Vec ref = Vec::set(reference);
    Vec a = Vec::zero(), b = Vec::zero();
    int i = 0;
    for (; i + 2 * Vec::width <= n; i += 2 * Vec::width) {
        a = a + exp(load(z + i) - ref);
        b = b + exp(load(z + i + Vec::width) - ref);
    }
    for (; i + Vec::width <= n; i += Vec::width) a = a + exp(load(z + i) - ref);
    if (i < n) b = b + exp(load_tail(z + i, n - i, -INFINITY) - ref);
    return (a + b).sum();
}

// Maximum and sum of exponentials of a whole row.
template <class T>
StreamState<double> row_exp_sum(const T* z, int64_t C, const Exp& exp) {
    StreamState<double> state;
    for (int64_t c = 0; c < C; c += kBlock) {
        const int n = int(std::min<int64_t>(kBlock, C - c));
        const float max = std::max(state.max, block_max(z + c, n));
        state.sum1 *= shift_factor(state.max, max, 1.0);
        state.max = max;
        state.sum1 += exp_sum(z + c, n, max == -INFINITY ? 0.0f : max, exp);
    }
    return state;
}

void confidence_forward(const ConfidenceArgs& args, int max_threads) {
    constexpr int W = Vec::width;
    const int K = args.K;
    const int threads = useful_threads(args.N * args.C * K, max_threads);
    const Exp exp(1.0f);
    // One row per lane.
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t begin = 0; begin < args.N; begin += W) {
        const int count = int(std::min<int64_t>(W, args.N - begin));
        float sum[kMaxTeachers][W], max[kMaxTeachers][W] = {}, label[kMaxTeachers][W] = {};
        int32_t kept[W] = {};
        for (auto& lanes : sum) std::fill_n(lanes, W, 1.0f);
        for (int lane = 0; lane < count; ++lane) {
            const RowLabels labels = row_labels(args.target, args.second, begin + lane, args.C, args.ignore_index);
            if (!labels.kept) continue;
            kept[lane] = -1;
            for (int k = 0; k < K; ++k) {
                with_dtype(args.logits[k].dtype, [&](auto t) {
                    const auto* z = row_start<decltype(t)>(args.logits[k], args.S, begin + lane);
                    StreamState<double> state = row_exp_sum(z, args.C, exp);
                    sum[k][lane] = float(state.sum1);
                    max[k][lane] = state.max;
                    const auto distance = [&](int64_t y) { return load_one(z + y) - state.max; };
                    label[k][lane] = !labels.valid ? NAN
                                     : labels.second < 0
                                         ? distance(labels.first)
                                         : mixed(labels.share, distance(labels.first), distance(labels.second));
                });
            }
        }
        Vec ce[kMaxTeachers], weights[kMaxTeachers], scratch[kMaxTeachers];
        const Vec mask = Vec::load(reinterpret_cast<const float*>(kept));
        auto store_row = [&](float* rows, int k, Vec x) {
            store_lanes(rows + k * args.N + begin, Vec::bit_and(x, mask), count);
        };
        for (int k = 0; k < K; ++k) {
            const Vec log_sum = LaneMath::log(Vec::load(sum[k])), top = Vec::load(max[k]);
            ce[k] = log_sum - Vec::load(label[k]);
            store_row(args.lse, k, top + log_sum);
            store_row(args.ce, k, ce[k]);
        }
        confidence_weights<LaneMath>(ce, K, weights, scratch);
        for (int k = 0; k < K; ++k) {
            store_row(args.weights, k, weights[k]);
            if (args.weights_copy) store_row(args.weights_copy, k, weights[k]);
        }
    }
}

template <class T>
void softmax_gradient(const T* z, int64_t C, float lse, float scale, const RowLabels& labels, const Exp& exp, T* out) {
    const Vec shift = Vec::set(lse), factor = Vec::set(scale);
    auto value = [&](Vec x) { return factor * exp(x - shift); };
    int64_t i = 0;
    for (; i + Vec::width <= C; i += Vec::width) store(out + i, value(load(z + i)));
    if (i < C) store_tail(out + i, value(load_tail(z + i, int(C - i), -INFINITY)), int(C - i));
    auto write_label = [&](int64_t y, float share) {
        if (y >= 0 && y < C) store_tail(out + y, value(load_tail(z + y, 1, 0.0f)) - Vec::set(scale * share), 1);
    };
    write_label(labels.first, labels.share);
    write_label(labels.second, 1.0f - labels.share);
}

void confidence_backward(const ConfidenceArgs& args, int max_threads) {
    const int threads = useful_threads(args.N * args.C * args.K, max_threads);
    const Exp exp(1.0f);
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2) if (threads > 1)
    for (int k = 0; k < args.K; ++k) {
        for (int64_t n = 0; n < args.N; ++n) {
            const float scale = ce_gradient(args, k, n);
            with_dtype(args.logits[k].dtype, [&](auto t) {
                using T = decltype(t);
                T* out = static_cast<T*>(args.grads[k]) + n * args.C;
                // Ignored rows have gradient 0, and their logits may be NaN.
                if (scale == 0) {
                    std::memset(out, 0, args.C * sizeof(T));
                    return;
                }
                const T* z = row_start<T>(args.logits[k], args.S, n);
                const RowLabels labels = row_labels(args.target, args.second, n, args.C, args.ignore_index);
                softmax_gradient(z, args.C, args.lse[k * args.N + n], scale, labels, exp, out);
            });
        }
    }
}

}  // namespace
}  // namespace camkd::cpu
