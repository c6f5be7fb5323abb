// The logit loss on a CPU: one read of the K + 1 rows of a sample leaves their exponentials in scratch, and one pass
// over the scratch writes the gradient. Rows run in parallel; when they are few and wide, the columns of a row do.
#pragma once

#include <omp.h>

#include <algorithm>
#include <memory>
#include <new>

#include "row_gradient.h"

namespace camkd::cpu {
namespace {

constexpr int64_t kRowScratch = 4 * 1024 * 1024;   // bytes; all threads share a wider row
constexpr int64_t kKeptScratch = 2 * kRowScratch;  // bytes that a thread keeps after a call
constexpr int64_t kGroupScratch = 128 * 1024;      // bytes of the rows of a group, which stay in L2

// Scratch floats that are kept from call to call, so that a step does not fault in fresh pages.
class Scratch {
  public:
    ~Scratch() { release(); }
    float* reserve(int64_t floats) {
        if (floats > capacity_) {
            release();
            data_ = static_cast<float*>(::operator new(floats * sizeof(float), std::align_val_t(64)));
            capacity_ = floats;
        }
        return data_;
    }

  private:
    void release() {
        if (data_) ::operator delete(data_, std::align_val_t(64));
        data_ = nullptr;
        capacity_ = 0;
    }
    float* data_ = nullptr;
    int64_t capacity_ = 0;
};

inline int64_t block_count(int64_t C) {
    return (C + kBlock - 1) / kBlock;
}

// Rows per group, whose row_stats are computed together: one per lane, unless their scratch would leave L2 or a thread
// would get none.
inline int rows_per_group(int64_t N, int64_t row_bytes, int threads) {
    const int64_t near = std::max<int64_t>(1, kGroupScratch / row_bytes), each = (N + threads - 1) / threads;
    return int(std::min<int64_t>({Vec::width, near, std::max<int64_t>(each, 1)}));
}

inline void rows_in_parallel(const RowLossArgs& args, const RowFunctions& functions, const Exps& exps, int threads,
                             bool streaming) {
    const int64_t blocks = block_count(args.C);
    const int64_t row_floats = RowScratch::floats(args, functions, blocks);
    const int group = rows_per_group(args.N, row_floats * int64_t(sizeof(float)), threads);
    const int64_t groups = (args.N + group - 1) / group;
    const int64_t chunk = std::max<int64_t>(1, groups / (threads * 8));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        static thread_local Scratch kept;
        Scratch wide;  // released after the call, for at most a quarter of its time: fresh pages
        const int64_t floats = group * row_floats + BlockScratch::floats(args);
        float* base = (floats * int64_t(sizeof(float)) <= kKeptScratch ? kept : wide).reserve(floats);
        const BlockScratch block(base + group * row_floats);
        const RowScratch first(base, args, functions);
        LaneRows rows;
#pragma omp for schedule(dynamic, chunk)
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t begin = g * group;
            const int count = int(std::min<int64_t>(group, args.N - begin));
            rows.reset(args.K);
            auto at = [&](int lane) {
                return RowPasses(args, functions, exps, first.moved(lane * row_floats), begin + lane);
            };
            // Read the rows of the group
            for (int lane = 0; lane < count; ++lane) {
                RowPasses row = at(lane);
                if (row.ignored()) continue;
                row.locate();
                row.read(blocks, block, rows, lane);
            }
            // Compute weights and losses
            rows.write(args, begin, count);
            // Write the gradient
            for (int lane = 0; args.grad_student && lane < count; ++lane) {
                RowPasses row = at(lane);
                if (row.ignored()) {
                    row.clear_grad();
                    continue;
                }
                if (args.formula.maps) row.locate();
                for (int64_t b = 0; b < blocks; ++b) GradientBlock(row, rows, lane, b).write(block, streaming);
            }
        }
    }
}

// All threads share a row: each takes a contiguous range of its blocks, and the partial states are merged in order.
inline void columns_in_parallel(const RowLossArgs& args, const RowFunctions& functions, const Exps& exps, int threads,
                                bool streaming) {
    const int64_t blocks = block_count(args.C);
    threads = int(std::min<int64_t>(threads, blocks));
    const int64_t row_floats = RowScratch::floats(args, functions, blocks), block_floats = BlockScratch::floats(args);
    Scratch memory;
    float* base = memory.reserve(row_floats + threads * block_floats);
    const double inverseT = 1.0 / args.formula.temperature;
    std::unique_ptr<State[]> partial(new State[threads * kMaxStreams]);
    std::unique_ptr<MixedSums[]> mixed(
        is_mixture(args.formula) && args.shard != Shard::sums ? new MixedSums[threads * kMaxTeachers] : nullptr);
    LaneRows shared;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int num_threads = omp_get_num_threads(), thread = omp_get_thread_num();
        const int64_t begin = blocks * thread / num_threads, end = blocks * (thread + 1) / num_threads;
        const BlockScratch block(base + row_floats + thread * block_floats);
        State* own = partial.get() + thread * kMaxStreams;
        for (int64_t n = 0; n < args.N; ++n) {
            RowPasses row(args, functions, exps, RowScratch(base, args, functions), n);
            const bool ignored = row.ignored();
            // Read this thread's blocks
            if (!ignored) {
                row.locate();
                for (int k = 0; k <= args.K; ++k) own[k] = State();
                for (int64_t b = begin; b < end; ++b) row.add_block(b, own, block);
            }
#pragma omp barrier
#pragma omp single
            {
                // Reduce across the threads
                shared.reset(args.K);
                for (int t = 1; !ignored && t < num_threads; ++t)
                    merge_states(args.formula, partial.get(), partial.get() + t * kMaxStreams, args.K, inverseT);
                if (!ignored) row.store_sums(partial.get(), shared, 0);
            }
            // For jsd and skew, mix this thread's blocks with the sums of the row
            if (mixed && !ignored) {
                MixedSums* const sums = mixed.get() + thread * kMaxTeachers;
                std::fill_n(sums, args.K, MixedSums());
                for (int64_t b = begin; b < end; ++b) row.mix_block(b, shared, 0, sums);
#pragma omp barrier
            }
#pragma omp single
            {
                if (mixed && !ignored) {
                    for (int t = 1; t < num_threads; ++t)
                        for (int k = 0; k < args.K; ++k) mixed[k].add(mixed[t * kMaxTeachers + k]);
                    row.store_mixed(mixed.get(), shared, 0);
                }
                shared.write(args, n, 1);
                if (ignored && args.grad_student) row.clear_grad();
            }
            // Write the gradient
            if (args.grad_student && !ignored)
                for (int64_t b = begin; b < end; ++b) GradientBlock(row, shared, 0, b).write(block, streaming);
#pragma omp barrier
        }
    }
}

void row_loss(const RowLossArgs& args, int max_threads) {
    const RowFunctions functions = choose_functions(args);
    const Exps exps{Exp(1.0f / args.formula.temperature), Exp(1.0f)};
    const int threads = useful_threads(args.N * args.C * (args.K + 1), max_threads);
    const int64_t scratch = (args.K + 2) * args.C * int64_t(sizeof(float));
    const int64_t bytes = args.N * args.C * (args.streams[0].dtype == DType::f32 ? 4 : 2);
    const bool streaming = bytes > kStreamingBytes;
    if (threads > 1 && (args.N < threads || scratch > kRowScratch)) {
        columns_in_parallel(args, functions, exps, threads, streaming);
    } else {
        rows_in_parallel(args, functions, exps, threads, streaming);
    }
}

}  // namespace
}  // namespace camkd::cpu
