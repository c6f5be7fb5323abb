// Launcher of the scaling of a gradient.
#include "scale_rows.cuh"

#include "launch.h"

namespace camkd::cuda {

void scale_rows(const ScaleRowsArgs& args, const LaunchOptions& options) {
    if (args.N * args.C == 0) return;
    ScaleLaunch launch{args, false};
    const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % sizeof(Pack) == 0; };
    launch.wide = aligned(args.grad) && aligned(args.out);
    with_element(args.dtype, false, [&](auto element) {
        using T = decltype(element);
        const Limits& limits = device_limits();
        const int64_t vectors = ceil_div(args.N * args.C, kVector<T>);
        const int64_t blocks = std::min<int64_t>(ceil_div(vectors, limits.block_threads),
                                                 int64_t(limits.multiprocessors) * kBlocksPerMultiprocessor);
        launch_kernel(&scale_rows_kernel<T>, {blocks, limits.block_threads, 1, 0}, launch, options);
    });
}

}  // namespace camkd::cuda
