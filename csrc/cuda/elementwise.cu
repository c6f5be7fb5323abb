// Launchers of the feature error, its gradient, and the scaling of a gradient.
#include "elementwise.cuh"

#include "launch.h"

namespace camkd::cuda {
namespace {

struct Plan {
    FeatureLaunch launch;
    DType dtype;
    bool mixed;
    int widest;  // M
};

Plan plan_of(const FeatureArgs& args, bool outputs) {
    Plan plan{};
    plan.launch.args = args;
    plan.dtype = args.student[0].dtype;
    for (int k = 0; k < args.K; ++k) {
        plan.launch.M[k] = int(args.M[k]);
        plan.widest = std::max(plan.widest, plan.launch.M[k]);
        plan.mixed = plan.mixed || args.student[k].dtype != plan.dtype || args.teacher[k].dtype != plan.dtype;
    }
    for (int k = 0; k < args.K; ++k) {
        const Matrix grad = dense(args.grads[k], args.M[k], args.N, args.student[k].dtype);
        plan.launch.wide[k] = !plan.mixed && aligned_alike({&args.student[k], &args.teacher[k]}, args.N, args.N) &&
                              (!outputs || aligned_alike({&args.student[k], &grad}, args.N, args.N));
    }
    return plan;
}

template <class T, class Kernel>
void launch_features(Plan& plan, Kernel kernel, const LaunchOptions& options) {
    const FeatureArgs& args = plan.launch.args;
    const RowGrid g = row_grid(args.N * args.K, plan.widest, kVector<T>, device_limits());
    plan.launch.warp_per_row = g.warp_per_row;
    const int shared = int(sizeof(float)) * kWarpThreads;
    launch_kernel(kernel, {g.blocks, g.threads, 1, shared}, plan.launch, options);
}

}  // namespace

void feature_forward(const FeatureArgs& args, const LaunchOptions& options) {
    if (args.N == 0) return;
    Plan plan = plan_of(args, false);
    with_element(plan.dtype, plan.mixed, [&](auto element) {
        using T = decltype(element);
        launch_features<T>(plan, &feature_fwd_kernel<T>, options);
    });
}

void feature_backward(const FeatureArgs& args, const LaunchOptions& options) {
    if (args.N == 0) return;
    Plan plan = plan_of(args, true);
    with_element(plan.dtype, plan.mixed, [&](auto element) {
        using T = decltype(element);
        launch_features<T>(plan, &feature_bwd_kernel<T>, options);
    });
}

void scale_rows(const ScaleRowsArgs& args, const LaunchOptions& options) {
    if (args.N == 0) return;
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
