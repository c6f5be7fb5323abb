// Writes the gradient of a row chunk by chunk, and fetches what the group needs next into each slot of the row buffers
// as soon as it is free.
#pragma once

#include "group.cuh"

namespace camkd::cuda {

template <class T, bool WarpPerRow, int FixedK>
class RowGradient {
    using Group = RowGroup<T, WarpPerRow, FixedK>;
    using Info = typename Group::Info;
    using RowState = typename Group::RowState;
    static constexpr int V = kVector<T>;

  public:
    CAMKD_DEVICE RowGradient(const Group& group) : group_(group) {}

    // Writes chunk c of a row that is in the group's buffers for row r. Chunk c - 1 takes its place there, or after
    // chunk 0 the first chunk of the row that is `next_row`.
    CAMKD_DEVICE void write(const Info& info, const Info& next_row, int r, int c) const {
        const RowLossArgs& args = group_.launch.args;
        if (info.row >= args.N) return;
        const Info& after = c > 0 ? info : next_row;
        Chunk next = group_.chunk_of(after, r, c > 0 ? c - 1 : 0);
        if (!after.kept) next.held = 0;
        char* const out =
            static_cast<char*>(args.grad_student) + info.row * group_.launch.C * element_bytes(args.streams[0].dtype);
        if (args.grad_student != nullptr && info.kept) {
            // The last chunk was there for its sums
            if (group_.chunks() > 1) copies_wait();
            const RowState& state = group_.rows()[r];
            const Chunk chunk = group_.chunk_of(info, r, c);
            if (FixedK > 0 && !state.out_of_range)
                fixed_k_grad(info, state, chunk, out, after, next);
            else
                general_grad(info, state, chunk, out, after, next);
            // In one place for both, because separate stores made the loops spill
            if (info.second_vector >= 0)
                store_at(info.second_vector, group_.second(info).element, chunk, out,
                         group_.second_state(state).gradient);
            return;
        }
        // The gradient of an ignored row is 0.
        if (args.grad_student != nullptr) {
            const Columns columns = columns_of<T>(group_.launch.C, group_.launch.wide_out, out);
            const float zeros[V] = {};
            const int stride = group_.members() * group_.chunks();
            for (int v = c * group_.members() + group_.member(); v < columns.vectors; v += stride)
                store_vector<T>(out, args.streams[0].dtype, columns, v, zeros);
        }
        if (c == 0) group_.fetch_chunk(after, next);
    }

    // Writes the gradient of a row on the fast path that is its only chunk, where all rows are even and so is the
    // gradient. `next_row` has the same chunk.
    CAMKD_DEVICE void write_even(const Info& info, const Info& next_row, int r, const Chunk& chunk) const {
        const RowLossArgs& args = group_.launch.args;
        char* const out = static_cast<char*>(args.grad_student) + info.row * group_.launch.C * int64_t(sizeof(T));
        const RowState& state = group_.rows()[r];
        const FixedKRow<FixedK> row(info.logits, group_.temperature().scale, state.coefficients);
        const SlotRange all{0, chunk.held};
        with_power(group_.temperature().power, [&](auto power) {
            constexpr int P = decltype(power)::value;
            if (next_row.kept)
                fixed_k_whole_slots<P, true>(row, chunk, all, out, next_row, chunk);
            else
                fixed_k_whole_slots<P, false>(row, chunk, all, out, next_row, chunk);
        });
        store_at(info.label_vector, info.label_element, chunk, out, state.label_gradient);
        if (info.second_vector >= 0)
            store_at(info.second_vector, group_.second(info).element, chunk, out, group_.second_state(state).gradient);
    }

    // Writes chunk `chunk` of a row by the general passes, and fetches chunk `next` of row `after` into its slots.
    CAMKD_DEVICE void general_grad(const Info& info, const RowState& state, const Chunk& chunk, char* out,
                                   const Info& after, const Chunk& next) const {
        const Columns columns = columns_out(chunk);
        const float share = group_.has_two_labels(info) ? group_.second(info).share : 1.0f;
        const float at_label = label_coefficient(group_.launch.args.formula, group_.grad_scale()) * share;
        const int labelled = Group::slot_of(info.label_vector, chunk);
#pragma unroll 1
        for (int i = 0; i < chunk.count; ++i) {
            if (i < chunk.held) {
                float x[V];
                general_grad_vector<T>(group_.buffer(), chunk, i, group_.launch.args.K, group_.temperature(),
                                       state.references, state.sums, state.coefficients,
                                       i == labelled ? info.label_element : -1, at_label, x);
                store_vector<T>(out, dtype(), columns, chunk.vector(i), x);
            }
            group_.fetch_slot(after, next, i);
        }
    }

  private:
    // A gradient that is not aligned like the logits is written element by element.
    CAMKD_DEVICE Columns columns_out(const Chunk& chunk) const {
        Columns columns = chunk.columns;
        if (!group_.launch.wide_out) columns.whole = 0;
        return columns;
    }

    CAMKD_DEVICE void fixed_k_grad(const Info& info, const RowState& state, const Chunk& chunk, char* out,
                                   const Info& after, const Chunk& next) const {
        if constexpr (FixedK > 0) {
            const FixedKRow<FixedK> row(info.logits, group_.temperature().scale, state.coefficients);
            with_power(group_.temperature().power,
                       [&](auto power) { fixed_k_slots<decltype(power)::value>(row, chunk, out, after, next); });
            store_at(info.label_vector, info.label_element, chunk, out, state.label_gradient);
        }
    }

    // A label's column; its slot was written by this thread too.
    CAMKD_DEVICE void store_at(int vector, int element, const Chunk& chunk, char* out, float gradient) const {
        const int labelled = Group::slot_of(vector, chunk);
        if (unsigned(labelled) < unsigned(chunk.held))
            store_element(out, int64_t(vector) * V - chunk.columns.phase + element, dtype(), gradient);
    }

    // Slots of whole vectors, in this row and in the next one, have loops of their own without a test per vector.
    template <int P>
    CAMKD_DEVICE void fixed_k_slots(const FixedKRow<FixedK>& row, const Chunk& chunk, char* out, const Info& after,
                                    const Chunk& next) const {
        const Columns columns = columns_out(chunk);
        SlotRange whole = whole_slots(columns, chunk);
        if (after.kept) {
            const SlotRange other = whole_slots(next.columns, next);
            whole = {whole.begin > other.begin ? whole.begin : other.begin,
                     whole.end < other.end ? whole.end : other.end};
        }
        if (whole.begin >= whole.end) whole = {0, 0};
        // Two loops instead of a condition inside, which would spill
        if (after.kept)
            fixed_k_whole_slots<P, true>(row, chunk, whole, out, after, next);
        else
            fixed_k_whole_slots<P, false>(row, chunk, whole, out, after, next);
        // At most one slot comes before the others.
        const int end = chunk.held > next.held ? chunk.held : next.held;
#pragma unroll 1
        for (int i = whole.begin > 0 ? 0 : whole.end; i < end; i = i + 1 == whole.begin ? whole.end : i + 1) {
            if (i < chunk.held) {
                Pack packs[FixedK + 1];
                float x[V];
                read_slot<FixedK>(group_.buffer().slot(0, chunk.begin + i), packs);
                fixed_k_grad_vector<T, FixedK, P>(packs, group_.temperature().scale, row, x);
                store_vector<T>(out, dtype(), columns, chunk.vector(i), x);
            }
            group_.fetch_slot(after, next, i);
        }
    }

    // With `more`, copies the next row's vectors into the slots.
    template <int P, bool more>
    CAMKD_DEVICE void fixed_k_whole_slots(const FixedKRow<FixedK>& row, const Chunk& chunk, SlotRange slots, char* out,
                                          const Info& after, const Chunk& next) const {
        constexpr int K = FixedK;
        const char* from[K + 1];
#pragma unroll
        for (int k = 0; k <= K; ++k)
            from[k] = more ? vector_address<T>(after.address[k], next.columns, next.vector(slots.begin)) : nullptr;
        char* const to = const_cast<char*>(vector_address<T>(out, chunk.columns, chunk.vector(slots.begin)));
        write_fixed_k_slots<T, K, P, more>(row, group_.temperature().scale,
                                           group_.buffer().slot(0, chunk.begin + slots.begin), slots.end - slots.begin,
                                           from, to);
    }

    CAMKD_DEVICE DType dtype() const { return group_.launch.args.streams[0].dtype; }

    const Group group_;
};

}  // namespace camkd::cuda
