// The statistics of a row on the fast path, relative to its logits at the label (fixed_k_passes.cuh): the same three
// levels as in statistics.cuh, all of them additions.
#pragma once

#include "exchange.cuh"

namespace camkd::cuda {

template <class T, bool WarpPerRow, int FixedK>
class LabelStatistics {
    using Group = RowGroup<T, WarpPerRow, FixedK>;
    using Info = typename Group::Info;
    static constexpr int K = FixedK, count = kLabelSums<K>, stride = fold_stride<count>;

  public:
    CAMKD_DEVICE LabelStatistics(const Group& group) : group_(group) {}

    // Sums row r over this warp's part, for merge(), or into the row's label_sums where a warp has the whole row.
    CAMKD_DEVICE void sum_up(const Info& info, int r) const {
        sum_chunks(info, r, false, [&](auto add) {
            for (int c = 0; c < group_.chunks(); ++c) {
                add(group_.chunk_of(info, r, c));
                if (c + 1 < group_.chunks()) group_.fetch_chunk(info, group_.chunk_of(info, r, c + 1));
            }
        });
    }

    // Sums row r over this warp's part where it is a single chunk. `more`: the last group of copies is that of another
    // row, or empty.
    CAMKD_DEVICE void sum_up(const Info& info, int r, const Chunk& chunk, bool more) const {
        sum_chunks(info, r, more, [&](auto add) { add(chunk); });
    }

    // Adds the sums of row r of this block's warps, and then those of the group's blocks. Every block adds in order
    // of the ranks, so all get the same bits.
    template <class Exchange>
    CAMKD_DEVICE void merge(Exchange& exchange, int r) const {
        constexpr int packs = (count + 3) / 4;
        static_assert(packs <= K + 1, "one pack per stream");
        float* const row = group_.rows()[r].label_sums.of;
        float* const of_block = group_.blocks() > 1 ? reinterpret_cast<float*>(group_.outgoing(0)) : row;
        // The other lanes repeat the last number, which takes no branch.
        const bool adds = group_.lane() < count;
        const int mine = adds ? group_.lane() : count - 1;
        float sum = 0;
#pragma unroll 1
        for (int first = 0; first < group_.warps(); first += kBlockThreads / kWarp) {
#pragma unroll
            for (int warp = first; warp < first + kBlockThreads / kWarp; ++warp)
                if (warp < group_.warps()) sum += group_.label_sums(warp, r)[mine];
        }
        if (adds) of_block[mine] = sum;
        if (group_.blocks() > 1) {
            const uint32_t which = exchange.run(packs);
            const float* const inbox = reinterpret_cast<const float*>(group_.inbox(which, 0, 0)) + mine;
            sum = 0;
#pragma unroll 4
            for (int rank = 0; rank < group_.blocks(); ++rank) sum += inbox[rank * group_.message_floats()];
            if (adds) row[mine] = sum;
        }
        warp_barrier();
    }

  private:
    // `each` calls its argument with every chunk, in order.
    template <class Each>
    CAMKD_DEVICE void sum_chunks(const Info& info, int r, bool more, Each each) const {
        const float scale = group_.temperature().scale;
        float at[K + 1], sums[count];
        label_references<K>(info.logits.at, scale, at);
#pragma unroll
        for (int i = 0; i < count; ++i) sums[i] = 0;
        with_power(group_.temperature().power, [&](auto power) {
            constexpr int P = decltype(power)::value;
            each([&](const Chunk& chunk) {
                if (more)
                    copies_wait_but_last_group();
                else
                    copies_wait();
                add_vectors<T, K, P>(group_.buffer(), chunk, scale, at, sums);
            });
            if (P == 1) {
#pragma unroll
                for (int k = 0; k <= K; ++k) sums[label_sum(k, kSum1)] = sums[label_sum(k, kSumT)];
            }
        });
        const float sum = warp_fold(sums, group_.lane());
        float* const to = WarpPerRow ? group_.rows()[r].label_sums.of : group_.label_sums(group_.warp(), r);
        if (group_.lane() % stride == 0 && group_.lane() / stride < count) to[group_.lane() / stride] = sum;
    }

    const Group group_;
};

}  // namespace camkd::cuda
