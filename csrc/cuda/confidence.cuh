// Confidence weights of K sets of logits: cross-entropies at T = 1 forward, softmax - onehot backward. A warp or a
// block takes a row.
#pragma once

#include "api.h"
#include "batch_mean.cuh"
#include "exponentials.cuh"
#include "launch_table.h"
#include "rows.cuh"

namespace camkd::cuda {

struct ConfidenceLaunch {
    ConfidenceArgs args;
    int C;       // columns fit 32 bits on the device
    bool debug;  // assert that labels are valid
    bool warp_per_row;
    bool wide[kMaxTeachers];  // the logits (in backward also their gradient) can be accessed in 16-byte vectors
};

// Shared memory of a group: maxima and sums of its warps, then the results of the row per teacher.
struct ConfidenceRow {
    float max[kWarp], sum[kWarp];
    float ce[kMaxTeachers], weights[kMaxTeachers], scratch[kMaxTeachers];
};

// Maximum and sum of exponentials over this thread's part of a row. Branchless, at the cost of one more exponential per
// vector.
template <class T>
CAMKD_DEVICE void exp_sum(const ThreadGroup& group, const char* row, DType dtype, const Columns& columns, float& max,
                          float& sum) {
    constexpr int V = kVector<T>;
    max = -INFINITY;
    sum = 0;
    for (int v = group.member; v < columns.vectors; v += group.members) {
        float x[V];
        load_vector<T>(row, dtype, columns, v, -INFINITY, x);
        float top = max;
#pragma unroll
        for (int j = 0; j < V; ++j) top = fmaxf(top, x[j]);
        const float reference = finite(top);
        sum *= exp2_fast((max - reference) * kLog2E);
        max = top;
#pragma unroll
        for (int j = 0; j < V; ++j) sum += exp2_fast((x[j] - reference) * kLog2E);
    }
}

// Merges the maxima and sums of the lanes.
CAMKD_DEVICE void merge_exp_sums(float& max, float& sum) {
    const float top = warp_max(max);
    sum = warp_sum(sum * exp2_fast((max - finite(top)) * kLog2E));
    max = top;
}

template <class T>
CAMKD_KERNEL(kBlockThreads, 2)
confidence_fwd_kernel(CAMKD_PARAMETER ConfidenceLaunch launch) {
    const ConfidenceArgs& args = launch.args;
    const ThreadGroup group(launch.warp_per_row);
    const int warps = group.members / kWarp, warp = group.member / kWarp, lane = thread_id() % kWarp;
    ConfidenceRow& shared =
        reinterpret_cast<ConfidenceRow*>(shared_memory())[launch.warp_per_row ? thread_id() / kWarp : 0];
    if (args.inverse_valid && block_id() == 0) {
        float* const of_warps = reinterpret_cast<float*>(shared_memory());
        const float count = valid_rows(args.N, args.target, args.ignore_index, of_warps);
        if (thread_id() == 0) *args.inverse_valid = inverse_of(count);
        block_barrier();  // `of_warps` has been read before rows overwrite it
    }
    for (int64_t n = group.index; n < args.N; n += group.count) {
        const RowLabels labels = row_labels(args.target, args.second, n, launch.C, args.ignore_index);
        const bool kept = labels.kept;
        if (launch.debug) check_label(!kept || labels.valid);
        for (int k = 0; k < args.K; ++k) {
            float ce = 0, lse = 0;
            if (kept) {
                const Matrix& matrix = args.logits[k];
                const char* row = row_address(matrix, args.S, n);
                float max, sum;
                exp_sum<T>(group, row, matrix.dtype, columns_of<T>(launch.C, launch.wide[k], row), max, sum);
                merge_exp_sums(max, sum);
                if (warps > 1) {
                    if (lane == 0) {
                        shared.max[warp] = max;
                        shared.sum[warp] = sum;
                    }
                    group.barrier();
                    max = lane < warps ? shared.max[lane] : -INFINITY;
                    sum = lane < warps ? shared.sum[lane] : 0.0f;
                    group.barrier();  // all have read before the next teacher overwrites
                    merge_exp_sums(max, sum);
                }
                const float log_sum = std::log(sum), top = finite(max);
                lse = top + log_sum;
                float distance = NAN;
                if (labels.valid) {
                    distance = load_element(row, labels.first, matrix.dtype) - top;
                    if (labels.second >= 0)
                        distance = mixed(labels.share, distance, load_element(row, labels.second, matrix.dtype) - top);
                }
                ce = log_sum - distance;
            }
            if (group.member == 0) {
                args.lse[k * args.N + n] = lse;
                args.ce[k * args.N + n] = ce;
                shared.ce[k] = ce;
            }
        }
        if (group.member == 0) {
            confidence_weights<ScalarMath>(shared.ce, args.K, shared.weights, shared.scratch);
            for (int k = 0; k < args.K; ++k) {
                const float weight = kept ? shared.weights[k] : 0.0f;
                args.weights[k * args.N + n] = weight;
                if (args.weights_copy) args.weights_copy[k * args.N + n] = weight;
            }
        }
    }
}

template <class T>
CAMKD_KERNEL(kBlockThreads, 2)
confidence_bwd_kernel(CAMKD_PARAMETER ConfidenceLaunch launch) {
    constexpr int V = kVector<T>;
    const ConfidenceArgs& args = launch.args;
    const ThreadGroup group(launch.warp_per_row);
    for (int64_t item = group.index; item < args.N * args.K; item += group.count) {
        const int k = int(item / args.N);
        const int64_t n = item - k * args.N;
        const Matrix& matrix = args.logits[k];
        const float g = ce_gradient(args, k, n), lse = args.lse[item];
        const char* row = row_address(matrix, args.S, n);
        char* out = static_cast<char*>(args.grads[k]) + n * launch.C * element_bytes(matrix.dtype);
        const Columns columns = columns_of<T>(launch.C, launch.wide[k], out);
        const RowLabels labels = row_labels(args.target, args.second, n, launch.C, args.ignore_index);
        for (int v = group.member; v < columns.vectors; v += group.members) {
            float x[V];
            if (g != 0) {
                load_vector<T>(row, matrix.dtype, columns, v, -INFINITY, x);
#pragma unroll
                for (int j = 0; j < V; ++j) x[j] = g * exp2_fast((x[j] - lse) * kLog2E);
                const auto subtract = [&](int64_t label, float share) {
                    const int64_t at = label + columns.phase - int64_t(v) * V;
                    if (at < 0 || at >= V) return;
#pragma unroll
                    for (int j = 0; j < V; ++j)
                        if (j == at) x[j] -= share;
                };
                subtract(labels.first, g * labels.share);
                if (labels.second >= 0) subtract(labels.second, g * (1.0f - labels.share));
            } else {
                // Ignored rows have gradient 0, and their logits may be NaN.
#pragma unroll
                for (int j = 0; j < V; ++j) x[j] = 0.0f;
            }
            store_vector<T>(out, matrix.dtype, columns, v, x);
        }
    }
}

}  // namespace camkd::cuda
