// Writes the gradient of a row chunk by chunk, and fetches what the group needs next into each slot of the row buffers
// as soon as it is free.
#pragma once

#include "group.cuh"

namespace camkd::cuda {

template <class T, bool WarpPerRow, int FixedK>
class RowGradient {
    using Group = RowGroup<T, WarpPerRow, FixedK>;
    static constexpr int V = kVector<T>;
    static constexpr int ArrayK = Group::ArrayK;

  public:
    CAMKD_DEVICE RowGradient(const Group& group) : group_(group) {}

    // Writes chunk c of the group's row r, in an iteration of this parity. Chunk c - 1 takes its place in the buffers,
    // or after chunk 0 the first chunk of the next iteration's row r.
    CAMKD_DEVICE void write(const RowInfo& info, int r, int c, int parity) const {
        const RowLossArgs& args = group_.launch.args;
        if (info.row >= args.N) return;
        const RowInfo& after = c > 0 ? info : group_.infos(parity ^ 1)[r];
        Chunk next = group_.chunk_of(after, r, c > 0 ? c - 1 : 0);
        if (!after.kept) next.held = 0;
        char* const out =
            static_cast<char*>(args.grad_student) + info.row * group_.launch.C * element_bytes(args.streams[0].dtype);
        if (args.grad_student != nullptr && info.kept) {
            copies_wait();
            const RowState& state = group_.rows()[r];
            if (FixedK > 0 && state.fast_path)
                fixed_k_grad(info, state, group_.chunk_of(info, r, c), c, out, after, next);
            else
                general_grad(info, state, group_.chunk_of(info, r, c), c, out, after, next);
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

  private:
    // A gradient that is not aligned like the logits is written element by element.
    CAMKD_DEVICE Columns columns_out(const Chunk& chunk) const {
        Columns columns = chunk.columns;
        if (!group_.launch.wide_out) columns.whole = 0;
        return columns;
    }

    CAMKD_DEVICE void general_grad(const RowInfo& info, const RowState& state, const Chunk& chunk, int c, char* out,
                                   const RowInfo& after, const Chunk& next) const {
        const Columns columns = columns_out(chunk);
        const float at_label = label_coefficient(group_.launch.args.formula, group_.grad_scale());
        const int labelled = group_.label_slot(info, c);
#pragma unroll 1
        for (int i = 0; i < chunk.count; ++i) {
            if (i < chunk.held) {
                float x[V];
                general_grad_vector<T>(group_.buffer(), chunk, i, group_.launch.args.K, group_.temperature(),
                                       state.references, state.sums, state.coefficients,
                                       i == labelled ? info.label_element : -1, at_label, x);
                store_vector<T>(out, group_.launch.args.streams[0].dtype, columns, chunk.vector(i), x);
            }
            group_.fetch_slot(after, next, i);
        }
    }

    CAMKD_DEVICE void fixed_k_grad(const RowInfo& info, const RowState& state, const Chunk& chunk, int c, char* out,
                                   const RowInfo& after, const Chunk& next) const {
        constexpr int K = ArrayK;
        const Columns columns = columns_out(chunk);
        const float at_label = label_coefficient(group_.launch.args.formula, group_.grad_scale());
        const int labelled = group_.label_slot(info, c);
        const FixedKRow<K> row(state.references, state.coefficients);
        const char* addresses[K + 1];
#pragma unroll
        for (int k = 0; k <= K; ++k) addresses[k] = after.address[k];
#pragma unroll 1
        for (int i = 0; i < chunk.count; ++i) {
            if (i < chunk.held) {
                float x[V];
                fixed_k_grad_vector<T, K>(group_.buffer(), chunk.begin + i, group_.temperature(), row,
                                          i == labelled ? info.label_element : -1, at_label, x);
                store_vector<T>(out, group_.launch.args.streams[0].dtype, columns, chunk.vector(i), x);
            }
            if (i >= next.held) continue;
            if (whole_vector(next.columns, next.vector(i)))
                fetch_whole<T>(group_.buffer(), next, i, addresses, K);
            else
                fetch_elements<T>(group_.buffer(), next, i, group_.launch.args.streams, after.address, K);
        }
    }

    const Group group_;
};

}  // namespace camkd::cuda
