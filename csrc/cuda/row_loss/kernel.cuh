// The logit loss, one kernel for all widths. A group of threads (a warp, a block or a cluster of blocks) reads the K +
// 1 rows of a sample once into shared memory, merges its statistics, and writes the row's statistics and gradient.
// While it writes a gradient it already fetches the next row into the slots that become free. Rows too wide for shared
// memory pass through it in chunks: in order for the statistics, in reverse order for the gradient.
//
// Start reading at RowKernel::run. Its steps are in statistics.cuh, results.cuh and gradient.cuh, one thread's work on
// its vectors in passes.cuh and fixed_k_passes.cuh, and the division of work in ../launch_table.h.
#pragma once

#include "../batch_mean.cuh"
#include "gradient.cuh"
#include "results.cuh"
#include "statistics.cuh"

namespace camkd::cuda {

template <class T, bool WarpPerRow, int FixedK>
class RowKernel {
    using Group = RowGroup<T, WarpPerRow, FixedK>;
    static constexpr int V = kVector<T>;

  public:
    CAMKD_DEVICE RowKernel(const RowLaunch& launch)
        : group_{launch, WarpPerRow ? 0 : cluster_rank()}, statistics_(group_), results_(group_), gradient_(group_) {}

    CAMKD_DEVICE void run() {
        start();
        for (int iteration = 0; group_.infos(iteration & 1)[0].row < group_.launch.args.N; ++iteration) {
            const int parity = iteration & 1;
            const RowInfo* const infos = group_.infos(parity);
            // Sum up, one part per warp
#pragma unroll 1
            for (int r = 0; r < group_.rows_per_group(); ++r)
                if (infos[r].kept) statistics_.sum_up(infos[r], r);
            group_.barrier();
            // Prepare the next rows, in a warp that has nothing to merge
            if (group_.is_lookahead_warp())
                prepare_rows(infos[0].row + int64_t(group_.launch.groups) * group_.rows_per_group(), parity ^ 1);
            // Reduce across the block and the cluster
            if (!WarpPerRow && group_.is_merging_warp() && infos[0].kept) {
                statistics_.merge_warps();
                if (group_.cluster() > 1) statistics_.merge_blocks(infos[0]);
                warp_barrier();
            }
            // Compute the weights
            if (group_.is_merging_warp()) {
#pragma unroll 1
                for (int r = 0; r < group_.rows_per_group(); ++r) {
                    results_.compute_weights(infos[r], r);
                    if (WarpPerRow) results_.write_row_stats(infos[r], r);
                }
            }
            group_.barrier();
            // Write row_stats, by the look-ahead warp: the merging warp is on the critical path. The blocks of a
            // cluster alternate.
            if (!WarpPerRow && group_.is_lookahead_warp() && (iteration & (group_.cluster() - 1)) == group_.rank)
                results_.write_row_stats(infos[0], 0);
            // Write the gradient and load the next rows
            for (int c = group_.launch.args.grad_student ? group_.chunks() - 1 : 0; c >= 0; --c) {
#pragma unroll 1
                for (int r = 0; r < group_.rows_per_group(); ++r) gradient_.write(infos[r], r, c, parity);
            }
        }
        if (group_.launch.single_cluster)
            add_up_cluster();
        else if (group_.launch.counters)
            add_up_blocks(group_.launch.args, group_.launch.counters, group_.batch_scalars(),
                          WarpPerRow ? group_.warps() : 1, [&](int p, int i) { return group_.batch_sums(p)[i]; });
    }

  private:
    // Loads the first rows, and finds what the gradient is multiplied by.
    CAMKD_DEVICE void start() {
        if (group_.is_lookahead_warp()) {
            const int group =
                WarpPerRow ? int(block_id()) * group_.warps() + group_.warp() : int(block_id()) / group_.cluster();
            const int64_t first = int64_t(group) * group_.rows_per_group();
            next_label_ = label_of(first + group_.lane());
            prepare_rows(first, 0);
        }
        if (group_.cluster() > 1) {
            if (thread_id() < 2) mailbox_open(group_.box(thread_id()));
            cluster_barrier(true);
        }
        block_barrier();
        fetch_first_chunks(0);
        // While they arrive
        if (group_.is_lookahead_warp() && group_.lane() < row_stats::per_teacher)
            group_.batch_sums()[group_.lane()] = 0;
        if (group_.warp() == 0) write_batch_scalars();
        block_barrier();
    }

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

    // Fills in the group's next infos from row `first` on, with a lane per row and then per stream. Ignored rows and
    // rows beyond the last are never read. Also loads the labels of the rows after these, whose latency is long.
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
                const int column = int(y) + columns.phase, v = column / V;
                info.label_member = v & (group_.members() - 1);
                info.label_slot = v >> group_.shift();
                info.label_element = column % V;
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

    // The factors of the minibatch's numbers and of the gradient, by one warp. The labels are counted here, with the
    // other blocks, or by an earlier launch.
    CAMKD_DEVICE void write_batch_scalars() const {
        const RowLossArgs& args = group_.launch.args;
        float factor = args.batch.factor;
        if (args.batch.counts) {
            if (group_.launch.single_cluster)
                factor = inverse_of(count_labels(args, 0, args.N));
            else if (group_.launch.counters)
                factor = inverse_of(count_with_others(args, group_.launch.counters));
            else
                factor = args.batch.others[2];
        }
        if (group_.lane() == 0) {
            group_.batch_scalars()->factor = factor;
            group_.batch_scalars()->grad_scale = args.grad_scale * (args.batch.counts ? factor : 1.0f) *
                                                 (args.grad_scale_device ? *args.grad_scale_device : 1.0f);
        }
    }

    // Writes the numbers of the minibatch, one per warp, after the whole cluster has written row_stats.
    CAMKD_DEVICE void add_up_cluster() const {
        const RowLossArgs& args = group_.launch.args;
        cluster_barrier(true);
        if (cluster_rank() != 0) return;
        for (int i = thread_id() / kWarp; i < row_stats::per_teacher; i += block_threads() / kWarp) {
            float sum = 0;
            for (int64_t n = group_.lane(); n < args.N; n += kWarp) sum += args.row_stats[i * args.N + n];
            sum = warp_sum(sum);
            if (group_.lane() == 0) write_number(args.batch, i, sum * group_.batch_scalars()->factor);
        }
        if (thread_id() == 0) args.batch.others[2] = group_.batch_scalars()->factor;
    }

    const Group group_;
    RowStatistics<T, WarpPerRow, FixedK> statistics_;
    const RowResults<T, WarpPerRow, FixedK> results_;
    const RowGradient<T, WarpPerRow, FixedK> gradient_;
    int64_t next_label_ = 0;  // label of this lane's row among the rows to be prepared next
};

template <class T, bool WarpPerRow, int FixedK>
CAMKD_KERNEL(kBlockThreads, blocks_per_multiprocessor(FixedK))
row_loss_kernel(CAMKD_PARAMETER RowLaunch launch) {
    RowKernel<T, WarpPerRow, FixedK>(launch).run();
}

}  // namespace camkd::cuda
