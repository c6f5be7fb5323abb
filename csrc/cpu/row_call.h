// What surrounds the kernel in a call of the logit loss: it counts the labels before and sums over the rows after.
#pragma once

#include <array>

#include "api.h"

namespace camkd::cpu {

struct LabelCount {
    int64_t valid;    // rows before the first invalid one that are not ignored
    int64_t invalid;  // the first row with an invalid label or share, or -1
};

inline LabelCount count_labels(const int64_t* target, const SecondLabels& second, int64_t N, int64_t C,
                               int64_t ignore_index) {
    int64_t valid = 0;
    for (int64_t n = 0; n < N; ++n) {
        const RowLabels labels = row_labels(target, second, n, C, ignore_index);
        if (!labels.kept) continue;
        if (!labels.valid) return {valid, n};
        ++valid;
    }
    return {valid, -1};
}

// Runs the kernel. Returns the sums of loss, hard and soft over the rows, added in order.
inline std::array<double, 3> run_row_loss(const RowLossArgs& args, int threads) {
    kernels().row_loss(args, threads);
    std::array<double, 3> sums{};
    if (writes_sums(args)) return sums;
    for (int i : {row_stats::loss, row_stats::hard, row_stats::soft})
        for (int64_t n = 0; n < args.N; ++n) sums[i] += args.row_stats[i * args.N + n];
    return sums;
}

}  // namespace camkd::cpu
