// The loss of a minibatch: the number of rows that are not ignored, and the sums over the rows.
//
// If one cluster computes the whole minibatch, its blocks meet at cluster barriers (RowMinibatch). Otherwise the blocks
// meet at a pair of counters in device memory: each adds the number of its labels before its first row and its arrival
// after its last one. The last block to arrive adds up the sums of all blocks, in their order, and resets the counters.
#pragma once

#include "api.h"
#include "device.cuh"

namespace camkd::cuda {

// Where the blocks of a launch meet; 0 between two launches.
struct BatchCounters {
    unsigned long long counted;  // blocks that have counted their labels, times 2^40, plus the labels that are kept
    uint32_t finished;           // blocks that have written their sums
};
constexpr int kCountBits = 40;

// Counters for a launch of the current device: no other launch uses them until it has ended. Null if there are none
// left; the minibatch then takes separate launches.
BatchCounters* counters_for(const LaunchOptions&);

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

// By one warp: how many of `count` labels from `first` on are not ignored.
CAMKD_DEVICE float count_labels(const RowLossArgs& args, int64_t first, int64_t count) {
    int kept = 0;
#pragma unroll 1
    for (int64_t i = thread_id() % kWarp; i < count; i += kWarp)
        kept += args.target[first + i] != args.formula.ignore_index;
    return warp_sum(float(kept));
}

// By one warp of every block: counts the block's part of the labels, for count_of_all.
CAMKD_DEVICE void count_labels_of_block(const RowLossArgs& args, int64_t labels_per_block, BatchCounters* counters) {
    const int64_t first = block_id() * labels_per_block, left = args.N - first;
    // None for a negative number
    const float mine = count_labels(args, first, left < labels_per_block ? left : labels_per_block);
    if (thread_id() % kWarp == 0) add_device(&counters->counted, (1ull << kCountBits) + (unsigned long long)(mine));
}

// By one warp, after count_labels_of_block: the number of labels that are not ignored. A block that has to wait too
// long, because others have not started yet, counts all of them itself; so nothing can hang.
CAMKD_DEVICE float count_of_all(const RowLossArgs& args, const BatchCounters* counters) {
    constexpr int polls = 1000;  // half a microsecond each
    const unsigned long long mask = (1ull << kCountBits) - 1;
    float all = -1;
    if (thread_id() % kWarp == 0) {
        for (int i = 0; i < polls && all < 0; ++i) {
            if (i > 0) pause();
            const unsigned long long seen = read_device(&counters->counted);
            if (int64_t(seen >> kCountBits) == block_count()) all = float(seen & mask);
        }
    }
    all = shuffle(all, 0);
    return all < 0 ? count_labels(args, 0, args.N) : all;
}

// Writes a number of the minibatch: loss, hard or soft.
CAMKD_DEVICE void write_number(const BatchOutput& batch, int i, float value) {
    *(i == 0 ? batch.loss : batch.others + i - 1) = value;
}

// What a block has in shared memory for the minibatch.
struct alignas(Pack) BatchScalars {
    float factor;      // of the numbers of the minibatch
    float grad_scale;  // of the gradient, this factor included
};

// The factor, by one warp. The labels have been counted by all blocks (count_labels_of_block), or by an earlier launch.
CAMKD_DEVICE float batch_factor(const RowLossArgs& args, const BatchCounters* counters) {
    if (!args.batch.counts) return args.batch.factor;
    return counters ? inverse_of(count_of_all(args, counters)) : args.batch.others[2];
}

// Writes the block's factors, by one of its warps.
CAMKD_DEVICE void write_batch_scalars(const RowLossArgs& args, float factor, BatchScalars* scalars) {
    if (thread_id() % kWarp != 0) return;
    scalars->factor = factor;
    scalars->grad_scale = args.grad_scale * (args.batch.counts ? factor : 1.0f) *
                          (args.grad_scale_device ? *args.grad_scale_device : 1.0f);
}

// By a whole block, in its last step. `part(p, i)` is the sum of loss, hard or soft over rows of this block, for p <
// parts. The block's sums become visible to the last block, which writes the numbers of the minibatch.
template <class Part>
CAMKD_DEVICE void add_up_blocks(const RowLossArgs& args, BatchCounters* counters, BatchScalars* scalars, int parts,
                                Part part) {
    constexpr int numbers = row_stats::per_teacher;
    const int lane = thread_id() % kWarp, warp = thread_id() / kWarp, warps = block_threads() / kWarp;
    float* const sums = args.batch.others + numbers;  // (blocks, numbers)
    block_barrier();
    if (warp == 0) {
        if (lane < numbers) {
            float sum = 0;
#pragma unroll 1
            for (int p = 0; p < parts; ++p) sum += part(p, lane);
            sums[block_id() * numbers + lane] = sum;
        }
    }
    if (!last_block(&counters->finished)) return;
    const float factor = scalars->factor;
    for (int i = warp; i < numbers; i += warps) {
        constexpr int several = 8;  // loads in flight
        float total = 0;
#pragma unroll 1
        for (int first = lane; first < int(block_count()); first += several * kWarp) {
            float found[several];
#pragma unroll
            for (int j = 0; j < several; ++j) {
                const int b = first + j * kWarp;
                found[j] = b < int(block_count()) ? read_device(&sums[b * numbers + i]) : 0.0f;
            }
#pragma unroll
            for (int j = 0; j < several; ++j) total += found[j];
        }
        total = warp_sum(total);
        if (lane == 0) write_number(args.batch, i, total * factor);
    }
    if (thread_id() == 0) {
        args.batch.others[2] = factor;
        counters->counted = 0;
    }
}

// By separate launches, where there are no counters or no rows: before the rows, writes the factor to
// args.batch.others[2]; after them, the numbers of the minibatch.
void count_rows(const RowLossArgs& args, const LaunchOptions&);
void add_up_rows(const RowLossArgs& args, const LaunchOptions&);

}  // namespace camkd::cuda
