// What a mean over the batch needs beside its rows: how many of them count, and their sums. One cluster that does a
// whole small batch does this as well (row_loss.cuh); for larger ones two kernels of a few blocks do.
#pragma once

#include "api.h"
#include "device.cuh"

namespace camkd::cuda {

CAMKD_DEVICE float inverse_of(float count) {
    return 1.0f / fmaxf(count, 1.0f);
}

// Number i of loss, hard, soft.
CAMKD_DEVICE void write_mean(const MeanOutput& mean, int i, float value) {
    *(i == 0 ? mean.loss : mean.others + i - 1) = value;
}

// Before the rows: 1 / rows that count, into args.mean.others[2].
void count_rows(const RowLossArgs& args, const LaunchOptions&);
// After the rows: the means of args.row_stats.
void average_rows(const RowLossArgs& args, const LaunchOptions&);

}  // namespace camkd::cuda
