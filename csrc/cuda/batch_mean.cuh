// The mean over a minibatch: the number of rows that are not ignored, and the sums over row_stats. For a small
// minibatch the row kernel does both (RowKernel::write_batch_means); for larger ones, two kernels of a few blocks run
// around it.
#pragma once

#include "api.h"
#include "device.cuh"

namespace camkd::cuda {

CAMKD_DEVICE float inverse_of(float count) {
    return 1.0f / fmaxf(count, 1.0f);
}

// The sum over the block, valid in thread 0 only. Warps are added in order, so the bits do not depend on the schedule.
// `of_warps`: shared memory for one number per warp.
CAMKD_DEVICE float block_sum(float x, float* of_warps) {
    x = warp_sum(x);
    if (thread_id() % kWarp == 0) of_warps[thread_id() / kWarp] = x;
    block_barrier();
    float sum = 0;
    for (int warp = 0; thread_id() == 0 && warp < block_threads() / kWarp; ++warp) sum += of_warps[warp];
    return sum;
}

// The number of labels that are not ignored, by one block, valid in thread 0 only.
CAMKD_DEVICE float valid_rows(int64_t N, const int64_t* target, int64_t ignore_index, float* of_warps) {
    int kept = 0;
    for (int64_t n = thread_id(); n < N; n += block_threads()) kept += target[n] != ignore_index;
    return block_sum(float(kept), of_warps);
}

// Writes the mean of row i of row_stats: loss, hard or soft.
CAMKD_DEVICE void write_mean(const MeanOutput& mean, int i, float value) {
    *(i == 0 ? mean.loss : mean.others + i - 1) = value;
}

// Runs before the rows: writes 1 / (number of rows, at least 1) to args.mean.others[2].
void count_rows(const RowLossArgs& args, const LaunchOptions&);
// Runs after the rows: writes the means of loss, hard and soft.
void average_rows(const RowLossArgs& args, const LaunchOptions&);

}  // namespace camkd::cuda
