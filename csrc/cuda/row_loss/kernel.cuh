// The logit loss, one kernel for every width: a team of threads (a warp, a block, a cluster of blocks) keeps the K + 1
// rows in shared memory from their only read on, merges its sums, and writes numbers and residual. While the residual
// of a row is written, the next row is fetched into the slots that become free. Rows too wide for that pass through the
// same slots in chunks, forwards for the sums and backwards for the residual.
#pragma once

#include "../batch_mean.cuh"
#include "statistics.cuh"

namespace camkd::cuda {

template <class T, bool WarpPerRow, int FixedK>
class RowKernel {
    using Group = RowGroup<T, WarpPerRow, FixedK>;
    static constexpr int V = kVector<T>;
    static constexpr int ArrayK = Group::ArrayK;

  public:
    CAMKD_DEVICE RowKernel(const RowLaunch& launch)
        : group_{launch, WarpPerRow ? 0 : cluster_rank()}, statistics_(group_) {}

    CAMKD_DEVICE void run() {
        if (group_.is_lookahead_warp()) {
            const int group =
                WarpPerRow ? int(block_id()) * group_.warps() + group_.warp() : int(block_id()) / group_.cluster();
            const int64_t first = int64_t(group) * group_.rows_per_group();
            next_label_ = label_of(first + group_.lane());
            prepare_rows(first, 0);
        }
        if (group_.warp() == 0) count_batch();
        if (group_.cluster() > 1) {
            if (thread_id() < 2) mailbox_open(group_.box(thread_id()));
            cluster_barrier(true);
        }
        block_barrier();
        fetch_first_chunks(0);
        for (int iteration = 0; group_.infos(iteration & 1)[0].row < group_.launch.args.N; ++iteration) {
            const int parity = iteration & 1;
            const RowInfo* const infos = group_.infos(parity);
#pragma unroll 1
            for (int r = 0; r < group_.rows_per_group(); ++r)
                if (infos[r].kept) statistics_.sum_up(infos[r], r);
            group_.barrier();
            if (group_.is_lookahead_warp())
                prepare_rows(infos[0].row + int64_t(group_.launch.groups) * group_.rows_per_group(), parity ^ 1);
            if (!WarpPerRow && group_.is_merging_warp() && infos[0].kept) {
                statistics_.merge_warps();
                if (group_.cluster() > 1) statistics_.merge_blocks(infos[0]);
                warp_barrier();
            }
            if (group_.is_merging_warp()) {
#pragma unroll 1
                for (int r = 0; r < group_.rows_per_group(); ++r) {
                    compute_weights(infos[r], r);
                    if (WarpPerRow) write_row_stats(infos[r], r);
                }
            }
            group_.barrier();
            // Not by the warp that the next row waits for most, and by one block after the other.
            if (!WarpPerRow && group_.is_lookahead_warp() && (iteration & (group_.cluster() - 1)) == group_.rank)
                write_row_stats(infos[0], 0);
            for (int b = group_.launch.args.grad_student ? group_.chunks() - 1 : 0; b >= 0; --b) {
#pragma unroll 1
                for (int r = 0; r < group_.rows_per_group(); ++r) write_grad(infos[r], r, b, parity);
            }
        }
        if (group_.launch.single_cluster) write_batch_means();
    }

  private:
    CAMKD_DEVICE void fetch_first_chunks(int parity) const {
        for (int r = 0; r < group_.rows_per_group(); ++r) {
            const RowInfo& info = group_.infos(parity)[r];
            if (info.kept) group_.fetch_chunk(info, group_.chunk_of(info, r, 0));
        }
    }

    CAMKD_DEVICE int64_t label_of(int64_t row) const {
        const RowLossArgs& args = group_.launch.args;
        return row < args.N ? args.target[row] : args.formula.ignore_index;
    }

    // Finds the team's next rows from `first` on, a row or a stream to each lane; an ignored row, or one beyond the
    // last, is not looked at. Asks for the labels of those after them, which take a while to come.
    CAMKD_DEVICE void prepare_rows(int64_t first, int parity) {
        const RowLossArgs& args = group_.launch.args;
        const int rows = group_.rows_per_group();
        RowInfo* const infos = group_.infos(parity);
        if (group_.lane() < rows) {
            RowInfo& info = infos[group_.lane()];
            const int64_t y = next_label_;
            info.row = first + group_.lane();
            info.kept = y != args.formula.ignore_index;
            info.label_valid = y >= 0 && y < group_.launch.C;
            info.label_member = info.label_slot = info.label_element = -1;
            if (info.kept && info.label_valid) {
                const Columns columns = columns_of<T>(group_.launch.C, group_.launch.wide_in,
                                                      row_address(args.streams[0], args.S, info.row));
                const int c = int(y) + columns.phase, v = c / V;
                info.label_member = v & (group_.members() - 1);
                info.label_slot = v >> group_.shift();
                info.label_element = c % V;
            }
            next_label_ = label_of(first + int64_t(group_.launch.groups) * rows + group_.lane());
        }
        if (group_.lane() <= args.K) {
            for (int r = 0; r < rows; ++r) {
                if (first + r < args.N)
                    infos[r].address[group_.lane()] = row_address(args.streams[group_.lane()], args.S, first + r);
            }
        }
        warp_barrier();
    }

    // By one warp for its block: the rows that count, counted here or by an earlier launch.
    CAMKD_DEVICE void count_batch() const {
        const RowLossArgs& args = group_.launch.args;
        float inverse = !group_.launch.single_cluster && args.mean.others ? args.mean.others[2] : 1.0f;
        if (group_.launch.single_cluster) {
            int kept = 0;
            for (int64_t n = group_.lane(); n < args.N; n += kWarp) kept += args.target[n] != args.formula.ignore_index;
            inverse = inverse_of(warp_sum(float(kept)));
        }
        if (group_.lane() == 0) {
            group_.batch_scalars()[0] = inverse;
            group_.batch_scalars()[1] =
                args.grad_scale * inverse * (args.grad_scale_device ? *args.grad_scale_device : 1.0f);
        }
    }

    // What the residual waits for, compute_weights of row_math.h with a lane for each teacher and the others for the
    // student.
    CAMKD_DEVICE void compute_weights(const RowInfo& info, int r) const {
        const RowLossArgs& args = group_.launch.args;
        if (group_.launch.debug) check_label(!info.kept || info.label_valid);
        if (!info.kept) return;
        RowState& state = group_.rows()[r];
        const int K = group_.teachers(), stream = group_.lane() < K ? group_.lane() + 1 : 0;
        const RowSums<float>& sums = state.sums[stream];
        const float sumT = sums.sumT, sum1 = sums.sum1, max = sums.max, log_sum1 = std::log(sum1);
        const float label = info.label_valid ? *group_.label_at(r, stream) : NAN, ce = log_sum1 - (label - max);
        float weight = 1.0f / float(K);
        if (args.formula.weighting == Weighting::given) {
            if (group_.lane() < K)
                weight = args.weights[group_.lane() * args.weight_stride_k + info.row * args.weight_stride_n];
        } else if (args.formula.weighting == Weighting::confidence && K > 1) {
            float top = -INFINITY, total = 0, others = 0;
            for (int k = 0; k < K; ++k) top = ScalarMath::max(shuffle(ce, k), top);
            const float mass = ScalarMath::exp(ScalarMath::difference(ce, top));
            for (int k = 0; k < K; ++k) {
                const float mass_k = shuffle(mass, k);
                total += mass_k;
                if (k != group_.lane()) others += mass_k;
            }
            weight = others * (1.0f / (total * float(K - 1)));
        } else if (args.formula.weighting == Weighting::entropy && K > 1) {
            const float entropy = log_sum1 - sums.plogp / sum1, total = over_teachers(entropy);
            weight = 1.0f - ScalarMath::where_positive(total, entropy / total, 1.0f / float(K));
        }
        const float total = over_teachers(weight), scale = group_.grad_scale();
        const float soft_scale = args.formula.soft_weight * args.formula.temperature * scale;
        // The coefficients of the residual take the factors that the exponentials of their references lack.
        const Reference reference(max, group_.temperature().scale);
        bool fast = !reference.far();
        if (group_.lane() < K) {
            const float coefficient = product_or_zero<ScalarMath>(weight, soft_scale / sumT);
            // Weight 0 silences even a NaN.
            fast = fast && (coefficient != 0 || sumT < INFINITY);
            state.coefficients.teacher[group_.lane()] = coefficient * reference.factor();
            state.result.teacher_ce[group_.lane()] = ce;
            state.result.weights[group_.lane()] = weight;
        } else if (group_.lane() == K) {
            state.coefficients.studentT = (soft_scale * total / sumT + label_nan(info)) * reference.factor();
            state.coefficients.student1 =
                label_coefficient(args.formula, scale) / sum1 * group_.temperature().factor1(reference, max);
            state.result.hard = ce;
        }
        if (group_.lane() <= K) state.references[stream] = reference;
        const bool all_fast = !warp_any(!fast);
        if (group_.lane() == 0) state.fast_path = all_fast;
        warp_barrier();
    }

    static CAMKD_DEVICE float label_nan(const RowInfo& info) { return info.label_valid ? 0.0f : NAN; }

    // The sum of a number of every teacher, in their order.
    CAMKD_DEVICE float over_teachers(float x) const {
        float sum = 0;
        for (int k = 0; k < group_.teachers(); ++k) sum += shuffle(x, k);
        return sum;
    }

    // The numbers that nothing waits for, compute_losses of row_math.h in the same way, and all of them where they are
    // wanted.
    CAMKD_DEVICE void write_row_stats(const RowInfo& info, int r) const {
        const RowLossArgs& args = group_.launch.args;
        const Formula& formula = args.formula;
        if (info.row >= args.N) return;
        const RowState& state = group_.rows()[r];
        const int K = group_.teachers(), k = group_.lane() < K ? group_.lane() : 0;
        float divergence = 0, hard = 0, soft = 0, loss = 0, ce = 0, weight = 0;
        if (info.kept) {
            const RowSums<float>& z = state.sums[k + 1];
            // One logarithm of the ratio: the difference of two would cancel where student and teacher agree.
            divergence = z.cross / (z.sumT * formula.temperature) + std::log(state.sums[0].sumT / z.sumT);
            ce = state.result.teacher_ce[k];
            weight = state.result.weights[k];
            hard = state.result.hard;
            soft = formula.temperature * formula.temperature *
                   over_teachers(product_or_zero<ScalarMath>(weight, divergence));
            // A label outside [0, C) makes the whole row NaN, whatever the weights are.
            loss = product_or_zero<ScalarMath>(formula.hard_weight, hard) +
                   product_or_zero<ScalarMath>(formula.soft_weight, soft) + label_nan(info);
        }
        float* const stats = args.row_stats + info.row;
        // Lanes 0, 1 and 2 write a row of row_stats each.
        static_assert(row_stats::loss == 0 && row_stats::hard == 1 && row_stats::soft == 2);
        if (group_.lane() <= row_stats::soft)
            stats[group_.lane() * args.N] = group_.lane() == row_stats::loss   ? loss
                                            : group_.lane() == row_stats::hard ? hard
                                                                               : soft;
        if (group_.lane() < K) {
            stats[row_stats::divergence(k) * args.N] = divergence;
            stats[row_stats::teacher_ce(K, k) * args.N] = ce;
            stats[row_stats::weight(K, k) * args.N] = weight;
        }
    }

    // Chunk b of a row's residual; what is needed next takes its place in the stash.
    CAMKD_DEVICE void write_grad(const RowInfo& info, int r, int b, int parity) const {
        const RowLossArgs& args = group_.launch.args;
        if (info.row >= args.N) return;
        const RowInfo& after = b > 0 ? info : group_.infos(parity ^ 1)[r];
        Chunk next = group_.chunk_of(after, r, b > 0 ? b - 1 : 0);
        if (!after.kept) next.held = 0;
        char* const out =
            static_cast<char*>(args.grad_student) + info.row * group_.launch.C * element_bytes(args.streams[0].dtype);
        if (args.grad_student != nullptr && info.kept) {
            copies_wait();
            const RowState& state = group_.rows()[r];
            if (FixedK > 0 && state.fast_path)
                fixed_k_grad(info, state, group_.chunk_of(info, r, b), b, out, after, next);
            else
                general_grad(info, state, group_.chunk_of(info, r, b), b, out, after, next);
            return;
        }
        if (args.grad_student != nullptr) {
            const Columns columns = columns_of<T>(group_.launch.C, group_.launch.wide_out, out);
            const float zeros[V] = {};
            const int stride = group_.members() * group_.chunks();
            for (int v = b * group_.members() + group_.member(); v < columns.vectors; v += stride)
                store_vector<T>(out, args.streams[0].dtype, columns, v, zeros);
        }
        if (b == 0) group_.fetch_chunk(after, next);
    }

    // Where the residual is not aligned like the logits it is written by the element.
    CAMKD_DEVICE Columns columns_out(const Chunk& chunk) const {
        Columns columns = chunk.columns;
        if (!group_.launch.wide_out) columns.whole = 0;
        return columns;
    }

    CAMKD_DEVICE void general_grad(const RowInfo& info, const RowState& state, const Chunk& chunk, int b, char* out,
                                   const RowInfo& after, const Chunk& next) const {
        const Columns columns = columns_out(chunk);
        const float at_label = label_coefficient(group_.launch.args.formula, group_.grad_scale());
        const int labelled = group_.label_slot(info, b);
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

    CAMKD_DEVICE void fixed_k_grad(const RowInfo& info, const RowState& state, const Chunk& chunk, int b, char* out,
                                   const RowInfo& after, const Chunk& next) const {
        constexpr int K = ArrayK;
        const Columns columns = columns_out(chunk);
        const float at_label = label_coefficient(group_.launch.args.formula, group_.grad_scale());
        const int labelled = group_.label_slot(info, b);
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

    // The means, once the whole cluster has written its numbers; a warp each.
    CAMKD_DEVICE void write_batch_means() {
        cluster_barrier(true);
        if (cluster_rank() != 0) return;
        for (int i = thread_id() / kWarp; i < row_stats::per_teacher; i += block_threads() / kWarp) {
            float sum = 0;
            for (int64_t n = group_.lane(); n < group_.launch.args.N; n += kWarp)
                sum += group_.launch.args.row_stats[i * group_.launch.args.N + n];
            sum = warp_sum(sum);
            if (group_.lane() == 0) write_mean(group_.launch.args.mean, i, sum * group_.batch_scalars()[0]);
        }
        if (thread_id() == 0) group_.launch.args.mean.others[2] = group_.batch_scalars()[0];
    }

    const Group group_;
    RowStatistics<T, WarpPerRow, FixedK> statistics_;
    int64_t next_label_ = 0;  // label of this lane's row in the next set of rows to prepare
};

template <class T, bool WarpPerRow, int FixedK>
CAMKD_KERNEL(kBlockThreads, blocks_per_multiprocessor(FixedK))
row_loss_kernel(CAMKD_PARAMETER RowLaunch launch) {
    RowKernel<T, WarpPerRow, FixedK>(launch).run();
}

}  // namespace camkd::cuda
