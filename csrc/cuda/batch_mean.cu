// The counters of batch_mean.cuh, its two kernels and their launchers.
#include "batch_mean.cuh"

#include "launch.h"

namespace camkd::cuda {
namespace {

// One pair for each stream, whose launches follow each other, and one for each launch in a CUDA graph, because graphs
// may run beside each other. 512 KB.
constexpr int kCounters = 1 << 15;
CAMKD_GLOBAL BatchCounters counters[kCounters];

struct BatchLaunch {
    int64_t N;
    const int64_t* target;
    int64_t ignore_index;
    const float* row_stats;  // loss, hard and soft are read
    BatchOutput batch;
};

CAMKD_DEVICE float* of_warps() {
    return reinterpret_cast<float*>(shared_memory());
}

CAMKD_KERNEL(kBatchThreads, 1)
batch_count_kernel(CAMKD_PARAMETER BatchLaunch launch) {
    const float count = valid_rows(launch.N, launch.target, launch.ignore_index, of_warps());
    if (thread_id() == 0) launch.batch.others[2] = launch.batch.counts ? inverse_of(count) : launch.batch.factor;
}

// One block each for loss, hard and soft.
CAMKD_KERNEL(kBatchThreads, 1)
batch_sum_kernel(CAMKD_PARAMETER BatchLaunch launch) {
    const int i = int(block_id());
    const float* const stats = launch.row_stats + i * launch.N;
    float sum = 0;
    for (int64_t n = thread_id(); n < launch.N; n += block_threads()) sum += stats[n];
    sum = block_sum(sum, of_warps());
    if (thread_id() == 0) write_number(launch.batch, i, sum * launch.batch.others[2]);
}

void launch(void (*kernel)(BatchLaunch), int64_t blocks, const RowLossArgs& args, const LaunchOptions& options) {
    const int threads = batch_threads(device_limits());
    const BatchLaunch launch{args.N, args.target, args.formula.ignore_index, args.row_stats, args.batch};
    launch_kernel(kernel, {blocks, threads, 1, threads / kWarpThreads * int(sizeof(float))}, launch, options);
}

}  // namespace

int64_t batch_floats(int64_t N) {
    return batch_floats(N, device_limits());
}

BatchCounters* counters_for(const LaunchOptions& options) {
    const int slot = launch_slot(options, SlotPool::counters, kCounters);
    return slot < 0 ? nullptr : static_cast<BatchCounters*>(device_address(counters)) + slot;
}

void count_rows(const RowLossArgs& args, const LaunchOptions& options) {
    launch(&batch_count_kernel, 1, args, options);
}

void add_up_rows(const RowLossArgs& args, const LaunchOptions& options) {
    launch(&batch_sum_kernel, row_stats::per_teacher, args, options);
}

}  // namespace camkd::cuda
