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

// Writes the mean of row i of row_stats: loss, hard or soft.
CAMKD_DEVICE void write_mean(const MeanOutput& mean, int i, float value) {
    *(i == 0 ? mean.loss : mean.others + i - 1) = value;
}

// Runs before the rows: writes 1 / (number of rows, at least 1) to args.mean.others[2].
void count_rows(const RowLossArgs& args, const LaunchOptions&);
// Runs after the rows: writes the means of loss, hard and soft.
void average_rows(const RowLossArgs& args, const LaunchOptions&);

}  // namespace camkd::cuda
