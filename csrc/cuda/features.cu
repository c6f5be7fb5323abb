// Launcher of the feature errors and their gradient.
#include "features.cuh"

#include "launch.h"

namespace camkd::cuda {

void features(const FeatureArgs& args, const LaunchOptions& options) {
    const int of_warps = int(sizeof(float)) * kWarpThreads;
    if (args.N == 0) {
        const FeatureLaunch nothing{args, false, 1, nullptr, nullptr};
        if (args.loss) launch_kernel(&feature_sum_kernel, {1, kWarpThreads, 1, of_warps}, nothing, options);
        return;
    }
    int64_t widest = 1;
    bool transposed = false;
    for (int k = 0; k < args.K; ++k) {
        widest = std::max(widest, values_of(args, k));
        transposed = transposed || !is_dense(args, k);
    }
    const int64_t items = args.N * args.K;
    const FeatureGrid g = feature_grid(items, widest, kFeatureParts, device_limits());
    FeatureLaunch launch{args, g.warp_per_row, g.parts, g.parts == 1 ? args.error : args.error + items, nullptr};
    const bool sums = args.error && (g.parts > 1 || args.loss);
    BatchCounters* const counters = sums ? counters_for(options) : nullptr;
    if (counters) launch.arrivals = &counters->finished;
    const int shared = of_warps + (transposed ? g.threads / kWarpThreads * int(sizeof(FeatureTile)) : 0);
    launch_kernel(&feature_kernel, {g.blocks, g.threads, 1, shared}, launch, options);
    if (sums && !counters) launch_kernel(&feature_sum_kernel, {1, g.threads, 1, of_warps}, launch, options);
}

}  // namespace camkd::cuda
