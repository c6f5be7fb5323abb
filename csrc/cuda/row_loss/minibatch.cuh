// The numbers of the minibatch in the row kernels: its divisor before the first gradient, and its means after the last
// row.
#pragma once

#include "../batch_mean.cuh"
#include "group.cuh"

namespace camkd::cuda {

template <class T, bool WarpPerRow, int FixedK>
class RowMinibatch {
    using Group = RowGroup<T, WarpPerRow, FixedK>;

  public:
    CAMKD_DEVICE RowMinibatch(const Group& group) : group_(group) {}

    // Counts this block's part of the labels, by one warp.
    CAMKD_DEVICE void start() const {
        if (group_.launch.counters && group_.launch.args.batch.counts)
            count_labels_of_block(group_.launch.args, group_.launch.labels_per_block, group_.launch.counters);
    }

    // The factors of the minibatch's numbers and of the gradient, by one warp. The labels are counted here, by all
    // blocks in start(), or by an earlier launch.
    CAMKD_DEVICE void write_scalars() const {
        const RowLossArgs& args = group_.launch.args;
        const bool here = args.batch.counts && group_.launch.single_cluster;
        const float factor =
            here ? inverse_of(count_labels(args, 0, args.N)) : batch_factor(args, group_.launch.counters);
        write_batch_scalars(args, factor, group_.batch_scalars());
    }

    // Adds up the rows, by all threads, after the last one.
    CAMKD_DEVICE void finish() const {
        if (group_.launch.single_cluster)
            add_up_cluster();
        else if (group_.launch.counters)
            add_up_blocks(group_.launch.args, group_.launch.counters, group_.batch_scalars(),
                          WarpPerRow ? group_.warps() : 1, [&](int p, int i) { return group_.batch_sums(p)[i]; });
    }

  private:
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
};

}  // namespace camkd::cuda
