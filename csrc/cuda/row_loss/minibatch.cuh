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

    // Counts this block's share of the labels, by one warp.
    CAMKD_DEVICE void start() const {
        if (group_.launch.counters && group_.launch.args.batch.counts)
            count_share(group_.launch.args, group_.launch.share, group_.launch.counters);
    }

    // The factors of the minibatch's numbers and of the gradient, by one warp. The labels are counted here, by all
    // blocks in start(), or by an earlier launch.
    CAMKD_DEVICE void write_scalars() const {
        const RowLossArgs& args = group_.launch.args;
        float factor = args.batch.factor;
        if (args.batch.counts) {
            if (group_.launch.single_cluster)
                factor = inverse_of(count_labels(args, 0, args.N));
            else if (group_.launch.counters)
                factor = inverse_of(count_of_all(args, group_.launch.counters));
            else
                factor = args.batch.others[2];
        }
        if (group_.lane() == 0) {
            group_.batch_scalars()->factor = factor;
            group_.batch_scalars()->grad_scale = args.grad_scale * (args.batch.counts ? factor : 1.0f) *
                                                 (args.grad_scale_device ? *args.grad_scale_device : 1.0f);
        }
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
