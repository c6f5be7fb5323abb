// The two kernels of batch_mean.cuh and their launchers.
#include "batch_mean.cuh"

#include "launch.h"

namespace camkd::cuda {
namespace {

struct BatchLaunch {
    int64_t N;
    const int64_t* target;
    int64_t ignore_index;
    const float* row_stats;  // loss, hard and soft are read
    MeanOutput mean;
};

CAMKD_DEVICE float* of_warps() {
    return reinterpret_cast<float*>(shared_memory());
}

CAMKD_KERNEL(kBatchThreads, 1)
batch_count_kernel(CAMKD_PARAMETER BatchLaunch launch) {
    const float count = valid_rows(launch.N, launch.target, launch.ignore_index, of_warps());
    if (thread_id() == 0) launch.mean.others[2] = inverse_of(count);
}

// One block each for loss, hard and soft.
CAMKD_KERNEL(kBatchThreads, 1)
batch_mean_kernel(CAMKD_PARAMETER BatchLaunch launch) {
    const int i = int(block_id());
    const float* const stats = launch.row_stats + i * launch.N;
    float sum = 0;
    for (int64_t n = thread_id(); n < launch.N; n += block_threads()) sum += stats[n];
    sum = block_sum(sum, of_warps());
    if (thread_id() == 0) write_mean(launch.mean, i, sum * launch.mean.others[2]);
}

void launch(void (*kernel)(BatchLaunch), int64_t blocks, const RowLossArgs& args, const LaunchOptions& options) {
    const int threads = batch_threads(device_limits());
    const BatchLaunch launch{args.N, args.target, args.formula.ignore_index, args.row_stats, args.mean};
    launch_kernel(kernel, {blocks, threads, 1, threads / kWarpThreads * int(sizeof(float))}, launch, options);
}

}  // namespace

void count_rows(const RowLossArgs& args, const LaunchOptions& options) {
    launch(&batch_count_kernel, 1, args, options);
}

void average_rows(const RowLossArgs& args, const LaunchOptions& options) {
    launch(&batch_mean_kernel, row_stats::per_teacher, args, options);
}

}  // namespace camkd::cuda
