// What stands around the kernel of one call of the logit loss: its labels, where its numbers go, their sums.
#pragma once

#include <array>

#include "api.h"

namespace camkd::cpu {

struct Labels {
    int64_t valid;  // labels that are not ignore_index, up to the offender
    bool offends;   // is one of them outside [0, C)?
    int64_t offender;
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

// Runs the kernel with its numbers in `numbers` (3 + 3K, N): loss, hard, soft, then divergence, teacher_ce and weights
// by teacher. Returns the sums of the first three over the rows, added in order.
inline std::array<double, 3> run_row_loss(RowLossArgs& args, float* numbers) {
    args.rows = numbers;
    args.divergence = args.rows + 3 * args.N;
    args.teacher_ce = args.divergence + args.K * args.N;
    args.weights_out = args.teacher_ce + args.K * args.N;
    kernels().row_loss(args);
    std::array<double, 3> sums{};
    for (int i = 0; i < 3; ++i)
        for (int64_t n = 0; n < args.N; ++n) sums[i] += args.rows[i * args.N + n];
    return sums;
}

}  // namespace camkd::cpu
