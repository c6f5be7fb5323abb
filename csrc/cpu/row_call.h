// What surrounds the kernel in a call of the logit loss: it counts the labels before and sums over the rows after.
#pragma once

#include <array>

#include "api.h"

namespace camkd::cpu {

struct Labels {
    int64_t valid;     // labels before the first invalid one that are not ignore_index
    bool has_invalid;  // is one of them outside [0, C)?
    int64_t invalid;   // the first of these
};

inline Labels count_labels(const int64_t* labels, int64_t N, int64_t C, int64_t ignore_index) {
    int64_t valid = 0;
    for (int64_t n = 0; n < N; ++n) {
        if (labels[n] == ignore_index) continue;
        if (labels[n] < 0 || labels[n] >= C) return {valid, true, labels[n]};
        ++valid;
    }
    return {valid, false, 0};
}

// Runs the kernel. Returns the sums of loss, hard and soft over the rows, added in order.
inline std::array<double, 3> run_row_loss(const RowLossArgs& args, int threads) {
    kernels().row_loss(args, threads);
    std::array<double, 3> sums{};
    for (int i : {row_stats::loss, row_stats::hard, row_stats::soft})
        for (int64_t n = 0; n < args.N; ++n) sums[i] += args.row_stats[i * args.N + n];
    return sums;
}

}  // namespace camkd::cpu
