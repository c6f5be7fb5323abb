// The logit loss has three kernels, of which kernel_for (launch.cuh) picks one:
//   warp_rows_kernel (warp_rows.cuh): a warp per row on the fast path, if all rows are alike (rows_alike)
//   pipelined_kernel (pipeline.cuh): wider rows on the fast path, if enough of them fill the pipelines
//   (pipeline_geometry)
//   row_loss_kernel (this file): all other rows, such as narrow ones of two labels, a few wide ones, those in chunks,
//   and every row for which there is no fast path (problem.fixed_k is 0)
//
// In this one a group of threads (a warp, a block or several blocks) reads the K + 1 rows of a sample once into shared
// memory, merges its statistics, and writes the row's statistics and gradient. While it writes a gradient it already
// fetches the next row into the slots that become free. Rows too wide for shared memory pass through it in chunks: in
// order for the statistics, in reverse order for the gradient.
//
// With a fixed number of teachers the statistics are relative to the logits at the label, which need no maximum. Where
// that leaves the safe range, the group sums the row up once more, relative to its maxima, as the general kernels do.
//
// Start reading at RowKernel::run. Its steps are in label_statistics.cuh or statistics.cuh, results.cuh and
// gradient.cuh, one thread's work on its vectors in fixed_k_passes.cuh or passes.cuh, and the division of work in
// ../launch_table.h.
#pragma once

#include "gradient.cuh"
#include "label_statistics.cuh"
#include "minibatch.cuh"
#include "results.cuh"
#include "statistics.cuh"

namespace camkd::cuda {

template <class T, bool WarpPerRow, int FixedK>
class RowKernel {
    using Group = RowGroup<T, WarpPerRow, FixedK>;
    using Info = typename Group::Info;
    static constexpr int V = kVector<T>;
    static constexpr int kRows = WarpPerRow ? kRowsPerWarp : 1;  // most rows that a group has in flight

  public:
    CAMKD_DEVICE RowKernel(const RowLaunch& launch)
        : group_{launch},
          label_statistics_(group_),
          statistics_(group_),
          exchange_(group_),
          results_(group_),
          gradient_(group_),
          minibatch_(group_) {}

    CAMKD_DEVICE void run() {
        start();
        for (int iteration = 0;; ++iteration) {
            const int parity = iteration & 1;
            const Info* const infos = group_.infos(parity);
            const int64_t next = infos[0].row + int64_t(group_.launch.groups) * group_.rows_per_group();
            const bool is_row = infos[0].row < group_.launch.args.N;
            if (is_row) {
                if (group_.is_lookahead_warp()) {
                    copies_wait();
                    load_logits(next);
                }
                // Sum up, one part per warp
#pragma unroll 1
                for (int r = 0; r < group_.rows_per_group(); ++r)
                    if (infos[r].kept) sum_up(infos[r], r);
            }
            // The other blocks have counted their labels meanwhile
            if (iteration == 0) {
                if (group_.warp() == 0) minibatch_.write_scalars();
                block_barrier();
            }
            if (!is_row) break;
            group_.barrier();
            // Prepare the next rows, in a warp that has nothing to merge
            if (group_.is_lookahead_warp()) prepare_rows(next, parity ^ 1);
            // Reduce across the block and the group, and compute the weights
#pragma unroll 1
            for (int r = 0; r < group_.rows_per_group(); ++r)
                if (group_.is_merging_warp()) merge(infos[r], r);
            group_.barrier();
            if constexpr (FixedK > 0) {
#pragma unroll 1
                for (int r = 0; r < group_.rows_per_group(); ++r)
                    if (infos[r].kept && group_.rows()[r].out_of_range) use_maxima(infos[r], r);
            }
            if (WarpPerRow) {
#pragma unroll 1
                for (int r = 0; r < group_.rows_per_group(); ++r) results_.write_row_stats(infos[r], r);
            }
            // Write row_stats, by the look-ahead warp: the merging warp is on the critical path. The blocks of a
            // group alternate.
            if (!WarpPerRow && group_.is_lookahead_warp() && iteration % group_.blocks() == group_rank())
                results_.write_row_stats(infos[0], 0);
            // Write the gradient and load the next rows
            for (int c = group_.launch.args.grad_student ? group_.chunks() - 1 : 0; c >= 0; --c) {
#pragma unroll 1
                for (int r = 0; r < group_.rows_per_group(); ++r)
                    gradient_.write(infos[r], group_.infos(parity ^ 1)[r], r, c);
            }
        }
        if (group_.is_merging_warp()) exchange_.end();
        exchange_.finish();
        minibatch_.finish();
    }

  private:
    // Fetches the first rows, and counts this block's part of the labels.
    CAMKD_DEVICE void start() {
        if (group_.is_lookahead_warp()) {
            const int64_t first = int64_t(group_.index()) * group_.rows_per_group();
            fetch_labels(first);
            copies_wait();
            load_logits(first);
            prepare_rows(first, 0);
        }
        if (group_.is_merging_warp()) exchange_.start();
        if (group_.blocks() > 1 && !group_.cooperative()) {
            if (thread_id() < 2) mailbox_open(group_.box(thread_id()));
            cluster_barrier(true);
        }
        block_barrier();
        fetch_first_chunks(0);
        // While they arrive
        if (group_.is_lookahead_warp() && group_.lane() < row_stats::per_teacher)
            group_.batch_sums()[group_.lane()] = 0;
        if (group_.warp() == 0) minibatch_.start();
    }

    CAMKD_DEVICE void sum_up(const Info& info, int r) const {
        if constexpr (FixedK > 0)
            label_statistics_.sum_up(info, r);
        else
            statistics_.sum_up(info, r);
    }

    // The merging warp makes the row's sums of its warps', and computes the weights.
    CAMKD_DEVICE void merge(const Info& info, int r) {
        if constexpr (FixedK > 0) {
            if (!WarpPerRow && info.kept) label_statistics_.merge(exchange_, r);
            results_.compute_label_weights(info, r);
        } else {
            if (!WarpPerRow && info.kept) statistics_.merge(exchange_, r);
            results_.compute_weights(info, r);
        }
    }

    // Replaces the results of the fast path.
    CAMKD_DEVICE void use_maxima(const Info& info, int r) {
        if (group_.chunks() > 1) group_.fetch_chunk(info, group_.chunk_of(info, r, 0));
        statistics_.sum_up(info, r);
        group_.barrier();
        if (group_.is_merging_warp()) {
            if (!WarpPerRow) statistics_.merge(exchange_, r);
            results_.compute_weights(info, r);
        }
        group_.barrier();
    }

    CAMKD_DEVICE void fetch_first_chunks(int parity) const {
        for (int r = 0; r < group_.rows_per_group(); ++r) {
            const Info& info = group_.infos(parity)[r];
            if (info.kept) group_.fetch_chunk(info, group_.chunk_of(info, r, 0));
        }
    }

    // The labels of the rows from `first` on, for load_logits, with a lane per row.
    CAMKD_DEVICE void fetch_labels(int64_t first) const {
        const RowLossArgs& args = group_.launch.args;
        if (group_.lane() >= group_.rows_per_group()) return;
        int64_t* const to = &group_.rows()[group_.lane()].next_label;
        const int64_t row = first + group_.lane();
        if (row < args.N)
            copy_async(to, args.target + row);
        else
            *to = args.formula.ignore_index;
        if (group_.two_labels() && row < args.N) {
            SecondState& second = group_.second_states()[group_.lane()];
            copy_async(&second.next_label, args.second.target + row);
            copy_async(&second.next_mix, args.second.mix + row);
        }
    }

    // Columns of the labels. `first` may be kIgnored or kInvalid; `second` is -1 if there is none.
    struct Labels {
        int first, second;
        float share;
    };

    // The labels that have been fetched, with a lane per row.
    CAMKD_DEVICE Labels labels_of_lane() const {
        if (group_.lane() >= group_.rows_per_group()) return {kIgnored, -1, 1.0f};
        const int64_t label = group_.rows()[group_.lane()].next_label;
        const int64_t ignore_index = group_.launch.args.formula.ignore_index;
        if (label == ignore_index) return {kIgnored, -1, 1.0f};
        if (!group_.two_labels()) return {label >= 0 && label < group_.launch.C ? int(label) : kInvalid, -1, 1.0f};
        const SecondState& second = group_.second_states()[group_.lane()];
        const RowLabels labels =
            RowLabels::of_two(label, second.next_label, second.next_mix, group_.launch.C, ignore_index);
        if (!labels.valid) return {kInvalid, -1, 1.0f};
        return {int(labels.first), int(labels.second), labels.share};
    }

    CAMKD_DEVICE static DType dtype_of(const Matrix& stream) {
        return sizeof(T) == 2 ? Elements<T>::dtype : stream.dtype;
    }

    // Loads logits for prepare_rows, a pass over the row ahead, because their latency is long: with a lane per stream,
    // those at the labels of the rows from `first` on. As bits: a conversion would wait for them.
    CAMKD_DEVICE void load_logits(int64_t first) {
        const RowLossArgs& args = group_.launch.args;
        const Labels labels = labels_of_lane();
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            if (r >= group_.rows_per_group()) continue;
            const int column = shuffle(labels.first, r);
            if (group_.lane() > group_.teachers() || column < 0) continue;
            const Matrix& stream = args.streams[group_.lane()];
            logits_[r] = load_bits(row_address(stream, args.S, first + r), column, dtype_of(stream));
        }
    }

    // Fills in the group's next infos from row `first` on, with a lane per row and then per stream. Ignored rows and
    // rows beyond the last are never read. Also loads the labels of the rows after these.
    CAMKD_DEVICE void prepare_rows(int64_t first, int parity) {
        const RowLossArgs& args = group_.launch.args;
        const int rows = group_.rows_per_group();
        Info* const infos = group_.infos(parity);
        const Labels labels = labels_of_lane();
        if (group_.lane() < rows) {
            Info& info = infos[group_.lane()];
            info.row = first + group_.lane();
            info.kept = labels.first != kIgnored;
            info.label_valid = labels.first >= 0;
            info.label_vector = info.label_element = info.second_vector = -1;
            if (info.label_valid) {
                const Columns columns = columns_of<T>(group_.launch.C, group_.launch.wide_in,
                                                      row_address(args.streams[0], args.S, info.row));
                const int column = labels.first + columns.phase;
                info.label_vector = column / V;
                info.label_element = column % V;
                if (labels.second >= 0) {
                    const int other = labels.second + columns.phase;
                    SecondInfo<FixedK>& second = group_.second(info);
                    second.share = labels.share;
                    info.second_vector = other / V;
                    second.element = other % V;
                }
            }
        }
        fetch_labels(first + int64_t(group_.launch.groups) * rows);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            if (r >= rows || first + r >= args.N) continue;
            const bool label_valid = shuffle(labels.first, r) >= 0, is_stream = group_.lane() <= group_.teachers();
            const int other = group_.two_labels() ? shuffle(labels.second, r) : -1;
            bool near = true;
            if (is_stream) {
                const Matrix& stream = args.streams[group_.lane()];
                float logit = label_valid ? element_from(logits_[r], dtype_of(stream)) : NAN;
                const char* const row = row_address(stream, args.S, first + r);
                infos[r].address[group_.lane()] = row;
                if (other >= 0) {
                    SecondInfo<FixedK>& second = group_.second(infos[r]);
                    second.logits[0][group_.lane()] = logit;
                    second.logits[1][group_.lane()] = load_element(row, other, dtype_of(stream));
                    logit = fmaxf(logit, second.logits[1][group_.lane()]);
                }
                infos[r].logits.at[group_.lane()] = logit;
                if constexpr (FixedK > 0) {
                    const Reference reference(logit, group_.temperature().scale);
                    infos[r].logits.factors[group_.lane()] = reference.factor();
                    near = !reference.far();
                }
            }
            if constexpr (FixedK > 0) {
                near = !warp_any(!near);
                if (group_.lane() == 0) infos[r].near = near;
            }
        }
        warp_barrier();
    }

    static constexpr int kIgnored = -2, kInvalid = -1;

    const Group group_;
    const LabelStatistics<T, WarpPerRow, FixedK> label_statistics_;
    const RowStatistics<T, WarpPerRow, FixedK> statistics_;
    RowExchange<Group> exchange_;
    const RowResults<T, WarpPerRow, FixedK> results_;
    const RowGradient<T, WarpPerRow, FixedK> gradient_;
    const RowMinibatch<T, WarpPerRow, FixedK> minibatch_;
    uint32_t logits_[kRows];  // of this lane's stream, at the labels of the rows to be prepared next
};

template <class T, bool WarpPerRow, int FixedK>
CAMKD_KERNEL(kBlockThreads, blocks_per_multiprocessor(FixedK))
row_loss_kernel(CAMKD_PARAMETER RowLaunch launch) {
    RowKernel<T, WarpPerRow, FixedK>(launch).run();
}

}  // namespace camkd::cuda
