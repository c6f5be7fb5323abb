// The statistics of a row for any logits (StreamState per stream), in three levels: each warp sums over its part of the
// row buffers, then one warp merges the warps of its block, then every block merges the blocks of its group.
#pragma once

#include "exchange.cuh"

namespace camkd::cuda {

template <class T, bool WarpPerRow, int FixedK>
class RowStatistics {
    using Group = RowGroup<T, WarpPerRow, FixedK>;
    using Info = typename Group::Info;

  public:
    CAMKD_DEVICE RowStatistics(const Group& group) : group_(group) {}

    // Sums row r over this warp's part, whose first chunk is in the buffers. The result stays in the warp's states, or
    // becomes the row's sums where a warp has the whole row.
    CAMKD_DEVICE void sum_up(const Info& info, int r) const {
        for (int c = 0; c < group_.chunks(); ++c) {
            copies_wait();
            sum_chunk(group_.chunk_of(info, r, c), group_.states(group_.warp(), c > 0));
            if (c + 1 < group_.chunks()) group_.fetch_chunk(info, group_.chunk_of(info, r, c + 1));
            if (c > 0) {
                if (group_.lane() == 0)
                    merge_states(group_.states(group_.warp(), 0), group_.states(group_.warp(), 1), group_.teachers(),
                                 group_.inverseT());
                warp_barrier();
            }
        }
        if (WarpPerRow) {
            if (group_.lane() <= group_.teachers())
                group_.rows()[r].sums[group_.lane()] = group_.states(group_.warp(), 0)[group_.lane()];
            warp_barrier();
        }
    }

    // Merges the states of this block's warps, and then those of the group's blocks, into the sums of row r. Every
    // block merges in order of the ranks, so all get the same bits.
    template <class Exchange>
    CAMKD_DEVICE void merge(Exchange& exchange, int r) const {
        State* const row = group_.rows()[r].sums;
        const auto store = [&](int k, const State& state) { row[k] = state; };
        const auto of_warp = [&](int lane, int k) { return group_.states(lane, 0)[k]; };
        if (group_.blocks() == 1) {
            general_merge(group_.lane(), group_.warps(), group_.teachers(), group_.inverseT(), of_warp, store);
        } else {
            general_merge(group_.lane(), group_.warps(), group_.teachers(), group_.inverseT(), of_warp,
                          [&](int k, const State& state) { write_message(state, group_.outgoing(k)); });
            const uint32_t which = exchange.run((group_.teachers() + 1) * group_.packs());
            general_merge(
                group_.lane(), group_.blocks(), group_.teachers(), group_.inverseT(),
                [&](int rank, int k) { return read_message(group_.inbox(which, rank, k)); }, store);
        }
        warp_barrier();
    }

  private:
    CAMKD_DEVICE void sum_chunk(const Chunk& chunk, State* states) const {
        const int K = group_.teachers();
        for (int k = 0; k <= K; ++k) {
            const float max = warp_max(general_max<T>(group_.buffer(), chunk, k));
            if (group_.lane() == 0) states[k].max = max;
        }
        warp_barrier();
        constexpr bool any_row = FixedK == 0;
        general_sums<T, 4, any_row>(group_.buffer(), chunk, K, group_.entropy(), group_.temperature(), group_.lane(),
                                    states);
        warp_barrier();
    }

    // The fixed-K kernels need no plogp.
    static CAMKD_DEVICE void write_message(const State& state, Pack* to) {
        to[0] = {{float_to_bits(state.max), float_to_bits(state.sumT), float_to_bits(state.sum1),
                  float_to_bits(state.cross)}};
        if (FixedK == 0) to[1] = {{float_to_bits(state.plogp), 0, 0, 0}};
    }
    static CAMKD_DEVICE State read_message(const Pack* from) {
        State state;
        state.max = bits_to_float(from->word[0]);
        state.sumT = bits_to_float(from->word[1]);
        state.sum1 = bits_to_float(from->word[2]);
        state.cross = bits_to_float(from->word[3]);
        if (FixedK == 0) state.plogp = bits_to_float(from[1].word[0]);
        return state;
    }

    const Group group_;
};

}  // namespace camkd::cuda
