// The statistics of a row (StreamState per stream), in three levels: each warp sums over its part of the row buffers,
// then one warp merges the warps of its block, then every block merges the blocks of its cluster.
#pragma once

#include "group.cuh"

namespace camkd::cuda {

template <class T, bool WarpPerRow, int FixedK>
class RowStatistics {
    using Group = RowGroup<T, WarpPerRow, FixedK>;
    static constexpr int ArrayK = Group::ArrayK;

  public:
    CAMKD_DEVICE RowStatistics(const Group& group) : group_(group) {}

    // Sums row r over this warp's part. The result stays in the warp's states, or becomes the row's sums where a warp
    // has the whole row.
    CAMKD_DEVICE void sum_up(const RowInfo& info, int r) {
        const int K = group_.teachers();
        for (int c = 0; c < group_.chunks(); ++c) {
            copies_wait();
            const Chunk chunk = group_.chunk_of(info, r, c);
            publish_labels(info, r, chunk, c);
            State* const sums = group_.states(group_.warp(), c > 0);
            const bool more = c + 1 < group_.chunks();
            if (FixedK == 0 || !fixed_k_statistics(chunk, sums)) general_statistics(chunk, sums);
            if (more) group_.fetch_chunk(info, group_.chunk_of(info, r, c + 1));
            if (c > 0) add_chunk();
        }
        if (WarpPerRow) {
            if (group_.lane() <= K)
                store_sums(group_.lane(), group_.states(group_.warp(), 0)[group_.lane()], group_.rows()[r].sums);
            warp_barrier();
        }
    }

    // Merges the states of this block's warps into the row's sums, or into the messages for the other blocks.
    CAMKD_DEVICE void merge_warps() {
        RowSums<float>* const row = group_.rows()[0].sums;
        const auto load = [&](int lane, int k) { return group_.states(lane, 0)[k]; };
        if constexpr (FixedK > 0) {
            fixed_k_merge<ArrayK>(group_.lane(), group_.warps(), group_.temperature().scale, load,
                                  [&](int k, int field, float value) {
                                      if (group_.cluster() > 1)
                                          group_.outgoing(k)->word[field] = float_to_bits(value);
                                      else
                                          as_floats(row + k)[field] = value;
                                  });
        } else {
            general_merge(group_.lane(), group_.warps(), group_.teachers(), group_.inverseT(), load,
                          [&](int k, const State& state) {
                              if (group_.cluster() > 1) {
                                  group_.outgoing(k)[0] = {{float_to_bits(state.max), float_to_bits(state.sumT),
                                                            float_to_bits(state.sum1), float_to_bits(state.cross)}};
                                  group_.outgoing(k)[1] = {{float_to_bits(state.plogp), 0, 0, 0}};
                              } else {
                                  store_sums(k, state, row);
                              }
                          });
        }
    }

    // Every block merges the blocks of its cluster in order of their ranks, so all get the same bits. Exchanges
    // alternate between two inboxes: a block that sends for the row after the next one has received every message for
    // the next row, and each of these was sent after its sender had read this row's inbox.
    CAMKD_DEVICE void merge_blocks(const RowInfo& info) {
        const int exchange = exchanges_++, count = (group_.teachers() + 1) * group_.packs();
        RowSums<float>* const row = group_.rows()[0].sums;
        warp_barrier();
        // Send the sums of this block, and the logits at the label if this block has them
        if (group_.lane() == 0)
            mailbox_expect(
                group_.box(exchange),
                (group_.cluster() * count + (info.label_valid ? group_.label_packs() : 0)) * RowShared::pack_bytes);
        for (int i = group_.lane(); i < group_.cluster() * count; i += kWarp)
            mailbox_send(group_.box(exchange), i / count, group_.inbox(exchange, group_.rank, 0) + i % count,
                         group_.outgoing(0)[i % count]);
        if (info.label_valid && info.label_member / block_threads() == group_.rank) {
            const Pack* const labels = reinterpret_cast<const Pack*>(group_.label_at(0, 0));
            for (int i = group_.lane(); i < group_.cluster() * group_.label_packs(); i += kWarp)
                mailbox_send(group_.box(exchange), i % group_.cluster(),
                             group_.inbox_labels(exchange) + i / group_.cluster(), labels[i / group_.cluster()]);
        }
        mailbox_wait(group_.box(exchange), exchange / 2);
        // Reduce across the cluster
        const auto load = [&](int rank, int k) {
            const Pack* const from = group_.inbox(exchange, rank, k);
            State state;
            state.max = bits_to_float(from->word[0]);
            state.sumT = bits_to_float(from->word[1]);
            state.sum1 = bits_to_float(from->word[2]);
            state.cross = bits_to_float(from->word[3]);
            if (FixedK == 0) state.plogp = bits_to_float(from[1].word[0]);
            return state;
        };
        if constexpr (FixedK > 0) {
            fixed_k_merge<ArrayK>(group_.lane(), group_.cluster(), group_.temperature().scale, load,
                                  [&](int k, int field, float value) { as_floats(row + k)[field] = value; });
        } else {
            general_merge(group_.lane(), group_.cluster(), group_.teachers(), group_.inverseT(), load,
                          [&](int k, const State& state) { store_sums(k, state, row); });
        }
        if (info.label_valid) {
            for (int k = group_.lane(); k <= group_.teachers(); k += kWarp)
                *group_.label_at(0, k) = bits_to_float(group_.inbox_labels(exchange)[k / 4].word[k % 4]);
        }
    }

  private:
    // Copies the logits at the label to where the whole block reads them, by the thread that has them.
    CAMKD_DEVICE void publish_labels(const RowInfo& info, int r, const Chunk& chunk, int c) const {
        const int i = group_.label_slot(info, c);
        if (unsigned(i) >= unsigned(chunk.held)) return;
        for (int k = 0; k <= group_.teachers(); ++k) {
            const float x = element_of<T>(*group_.buffer().slot(k, chunk.begin + i), info.label_element);
            *group_.label_at(r, k) = x;
        }
    }

    CAMKD_DEVICE void general_statistics(const Chunk& chunk, State* states) const {
        const int K = group_.launch.args.K;
        for (int k = 0; k <= K; ++k) {
            const float max = warp_max(general_max<T>(group_.buffer(), chunk, k));
            if (group_.lane() == 0) states[k].max = max;
        }
        warp_barrier();
        general_sums<T, 4>(group_.buffer(), chunk, K, group_.entropy(), group_.temperature(), group_.lane(), states);
        warp_barrier();
    }

    // Returns false, with nothing written, if a maximum is too far from 0 for the fixed-K pass.
    CAMKD_DEVICE bool fixed_k_statistics(const Chunk& chunk, State* states) const {
        constexpr int K = ArrayK, count = kSums * (K + 1), stride = fold_stride<count>;
        const float scale = group_.temperature().scale;
        float max[K + 1], at[K + 1], sums[count];
        fixed_k_maxima<T, K>(group_.buffer(), chunk, group_.lane(), max);
        bool far = false;
#pragma unroll
        for (int k = 0; k <= K; ++k) {
            const Reference reference(max[k], scale);
            at[k] = reference.at;
            far = far || reference.far();
        }
        if (far) return false;
        if (group_.lane() == 0) {
#pragma unroll
            for (int k = 0; k <= K; ++k) states[k].max = max[k];
        }
#pragma unroll
        for (int i = 0; i < count; ++i) sums[i] = 0;
        with_power(group_.temperature().power, [&](auto power) {
            fixed_k_sums<T, K, decltype(power)::value>(group_.buffer(), chunk, scale, at, sums);
        });
        const float sum = warp_fold(sums, group_.lane(), 0.0f, [](float a, float b) { return a + b; });
        if (group_.lane() % stride == 0 && group_.lane() / stride < count)
            as_floats(states + group_.lane() / stride / kSums)[1 + group_.lane() / stride % kSums] = sum;
        warp_barrier();
        if (group_.lane() <= K) {
            // Convert scaled distances to logits and apply the corrections of the references
            State& to = states[group_.lane()];
            const Reference reference(to.max, scale), student_reference(states[0].max, scale);
            const float factor = reference.factor(), sumT = to.sumT;
            to.cross = (to.cross - (reference.correction() - student_reference.correction()) * sumT) *
                       (factor * group_.temperature().inverse);
            to.sumT = sumT * factor;
            to.sum1 *= group_.temperature().factor1(reference, to.max);
        }
        warp_barrier();
        return true;
    }

    // Adds the sums of the current chunk to those of the chunks before it.
    CAMKD_DEVICE void add_chunk() const {
        if constexpr (FixedK > 0) {
            fixed_k_merge<ArrayK>(
                group_.lane(), 2, group_.temperature().scale,
                [&](int lane, int k) { return group_.states(group_.warp(), lane)[k]; },
                [&](int k, int field, float value) { as_floats(group_.states(group_.warp(), 0) + k)[field] = value; });
        } else if (group_.lane() == 0) {
            merge_states(group_.states(group_.warp(), 0), group_.states(group_.warp(), 1), group_.teachers(),
                         group_.inverseT());
        }
        warp_barrier();
    }

    // A State or RowSums as an array of floats, in declaration order.
    template <class Numbers>
    static CAMKD_DEVICE float* as_floats(Numbers* of) {
        static_assert(sizeof(Numbers) % sizeof(float) == 0);
        return &of->max;
    }

    static CAMKD_DEVICE void store_sums(int k, const State& state, RowSums<float>* sums) {
        sums[k].max = state.max;
        sums[k].sumT = state.sumT;
        sums[k].sum1 = state.sum1;
        sums[k].cross = state.cross;
        sums[k].plogp = state.plogp;
    }

    const Group group_;
    int exchanges_ = 0;  // messages exchanged so far, one per row
};

}  // namespace camkd::cuda
