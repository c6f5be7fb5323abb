// The sums of a row: of each thread and warp over the stash, then merged over the warps of a block and the blocks of a
// cluster.
#pragma once

#include "group.cuh"

namespace camkd::cuda {

template <class T, bool WarpTeams, int Teachers>
class RowStatistics {
    using Team = RowTeam<T, WarpTeams, Teachers>;
    static constexpr int Known = Team::Known;

  public:
    CAMKD_DEVICE RowStatistics(const Team& team) : team_(team) {}

    // The warp's sums of one row, in its states for a block to merge, or as the row's own where the team is the warp.
    CAMKD_DEVICE void sum_up(const RowInfo& info, int r) {
        const int K = team_.teachers();
        for (int b = 0; b < team_.batches(); ++b) {
            copies_wait();
            const Batch batch = team_.batch_of(info, r, b);
            publish_labels(info, r, batch, b);
            State* const sums = team_.states(team_.warp(), b > 0);
            const bool more = b + 1 < team_.batches();
            if (Teachers == 0 || !known_statistics(batch, sums)) any_statistics(batch, sums);
            if (more) team_.fetch_batch(info, team_.batch_of(info, r, b + 1));
            if (b > 0) add_batch();
        }
        if (WarpTeams) {
            if (team_.lane() <= K) put(team_.lane(), team_.states(team_.warp(), 0)[team_.lane()], team_.rows()[r].sums);
            warp_barrier();
        }
    }

    // The states of this block's warps: the row's sums, or what the cluster is sent.
    CAMKD_DEVICE void merge_warps() {
        RowSums<float>* const row = team_.rows()[0].sums;
        const auto load = [&](int lane, int k) { return team_.states(lane, 0)[k]; };
        if constexpr (Teachers > 0) {
            known_merge<Known>(team_.lane(), team_.warps(), team_.temperature().scale, load,
                               [&](int k, int field, float value) {
                                   if (team_.cluster() > 1)
                                       team_.outgoing(k)->word[field] = float_to_bits(value);
                                   else
                                       numbers_of(row + k)[field] = value;
                               });
        } else {
            merge_lanes(team_.lane(), team_.warps(), team_.teachers(), team_.inverseT(), load,
                        [&](int k, const State& state) {
                            if (team_.cluster() > 1) {
                                team_.outgoing(k)[0] = {{float_to_bits(state.max), float_to_bits(state.sumT),
                                                         float_to_bits(state.sum1), float_to_bits(state.cross)}};
                                team_.outgoing(k)[1] = {{float_to_bits(state.plogp), 0, 0, 0}};
                            } else {
                                put(k, state, row);
                            }
                        });
        }
    }

    // Every block merges the blocks of its cluster, in order of their ranks: the same bits everywhere. Two inboxes by
    // turns: a block that sends for the row after the next has had everybody's messages for the next one, and each of
    // those was sent after its sender had read the inbox of this row.
    CAMKD_DEVICE void merge_blocks(const RowInfo& info) {
        const int turn = turns_++, count = (team_.teachers() + 1) * team_.packs();
        RowSums<float>* const row = team_.rows()[0].sums;
        warp_barrier();
        if (team_.lane() == 0)
            mailbox_expect(team_.box(turn),
                           (team_.cluster() * count + (info.fits ? team_.label_packs() : 0)) * RowShared::pack_bytes);
        for (int i = team_.lane(); i < team_.cluster() * count; i += kWarp)
            mailbox_send(team_.box(turn), i / count, team_.inbox(turn, team_.rank, 0) + i % count,
                         team_.outgoing(0)[i % count]);
        if (info.fits && info.label_member / block_threads() == team_.rank) {
            const Pack* const labels = reinterpret_cast<const Pack*>(team_.label_at(0, 0));
            for (int i = team_.lane(); i < team_.cluster() * team_.label_packs(); i += kWarp)
                mailbox_send(team_.box(turn), i % team_.cluster(), team_.inbox_labels(turn) + i / team_.cluster(),
                             labels[i / team_.cluster()]);
        }
        mailbox_wait(team_.box(turn), turn / 2);
        const auto load = [&](int rank, int k) {
            const Pack* const from = team_.inbox(turn, rank, k);
            State state;
            state.max = bits_to_float(from->word[0]);
            state.sumT = bits_to_float(from->word[1]);
            state.sum1 = bits_to_float(from->word[2]);
            state.cross = bits_to_float(from->word[3]);
            if (Teachers == 0) state.plogp = bits_to_float(from[1].word[0]);
            return state;
        };
        if constexpr (Teachers > 0) {
            known_merge<Known>(team_.lane(), team_.cluster(), team_.temperature().scale, load,
                               [&](int k, int field, float value) { numbers_of(row + k)[field] = value; });
        } else {
            merge_lanes(team_.lane(), team_.cluster(), team_.teachers(), team_.inverseT(), load,
                        [&](int k, const State& state) { put(k, state, row); });
        }
        if (info.fits) {
            for (int k = team_.lane(); k <= team_.teachers(); k += kWarp)
                *team_.label_at(0, k) = bits_to_float(team_.inbox_labels(turn)[k / 4].word[k % 4]);
        }
    }

  private:
    CAMKD_DEVICE void publish_labels(const RowInfo& info, int r, const Batch& batch, int b) const {
        const int i = team_.label_slot(info, b);
        if (unsigned(i) >= unsigned(batch.held)) return;
        for (int k = 0; k <= team_.teachers(); ++k) {
            const float x = element_of<T>(*team_.stash().slot(k, batch.begin + i), info.label_place);
            *team_.label_at(r, k) = x;
        }
    }

    CAMKD_DEVICE void any_statistics(const Batch& batch, State* states) const {
        const int K = team_.launch.args.K;
        for (int k = 0; k <= K; ++k) {
            const float max = warp_max(stash_max<T>(team_.stash(), batch, k));
            if (team_.lane() == 0) states[k].max = max;
        }
        warp_barrier();
        stash_sums<T, 4>(team_.stash(), batch, K, team_.entropy(), team_.temperature(), team_.lane(), states);
        warp_barrier();
    }

    // False, and nothing done, for rows that it is not made for.
    CAMKD_DEVICE bool known_statistics(const Batch& batch, State* states) const {
        constexpr int K = Known, count = kSums * (K + 1), stride = fold_stride<count>;
        const float scale = team_.temperature().scale;
        float max[K + 1], at[K + 1], sums[count];
        known_maxima<T, K>(team_.stash(), batch, team_.lane(), max);
        bool far = false;
#pragma unroll
        for (int k = 0; k <= K; ++k) {
            const Reference reference(max[k], scale);
            at[k] = reference.at;
            far = far || reference.far();
        }
        if (far) return false;
        if (team_.lane() == 0) {
#pragma unroll
            for (int k = 0; k <= K; ++k) states[k].max = max[k];
        }
#pragma unroll
        for (int i = 0; i < count; ++i) sums[i] = 0;
        with_power(team_.temperature().power, [&](auto power) {
            known_sums<T, K, decltype(power)::value>(team_.stash(), batch, scale, at, sums);
        });
        const float sum = warp_fold(sums, team_.lane(), 0.0f, [](float a, float b) { return a + b; });
        if (team_.lane() % stride == 0 && team_.lane() / stride < count)
            numbers_of(states + team_.lane() / stride / kSums)[1 + team_.lane() / stride % kSums] = sum;
        warp_barrier();
        if (team_.lane() <= K) {
            // Back from scaled distances to logits, and what the references lack.
            State& to = states[team_.lane()];
            const Reference reference(to.max, scale), of_student(states[0].max, scale);
            const float factor = reference.factor(), sumT = to.sumT;
            to.cross =
                (to.cross - (reference.left() - of_student.left()) * sumT) * (factor * team_.temperature().inverse);
            to.sumT = sumT * factor;
            to.sum1 *= team_.temperature().factor1(reference, to.max);
        }
        warp_barrier();
        return true;
    }

    // The sums of a batch to those of the batches before it.
    CAMKD_DEVICE void add_batch() const {
        if constexpr (Teachers > 0) {
            known_merge<Known>(
                team_.lane(), 2, team_.temperature().scale,
                [&](int lane, int k) { return team_.states(team_.warp(), lane)[k]; },
                [&](int k, int field, float value) { numbers_of(team_.states(team_.warp(), 0) + k)[field] = value; });
        } else if (team_.lane() == 0) {
            merge_states(team_.states(team_.warp(), 0), team_.states(team_.warp(), 1), team_.teachers(),
                         team_.inverseT());
        }
        warp_barrier();
    }

    // The numbers of a state or of a row's sums, in the order of their declarations.
    template <class Numbers>
    static CAMKD_DEVICE float* numbers_of(Numbers* of) {
        static_assert(sizeof(Numbers) % sizeof(float) == 0);
        return &of->max;
    }

    static CAMKD_DEVICE void put(int k, const State& state, RowSums<float>* sums) {
        sums[k].max = state.max;
        sums[k].sumT = state.sumT;
        sums[k].sum1 = state.sum1;
        sums[k].cross = state.cross;
        sums[k].plogp = state.plogp;
    }

    const Team team_;
    int turns_ = 0;  // of the mailboxes
};

}  // namespace camkd::cuda
