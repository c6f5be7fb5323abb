// Launchers of the confidence weights and their gradient.
#include "confidence.cuh"

#include "launch.h"

namespace camkd::cuda {
namespace {

struct Plan {
    ConfidenceLaunch launch;
    DType dtype;
    bool mixed;
};

// `outputs`: the gradients too must have the alignment of the logits.
Plan plan_of(const ConfidenceArgs& args, const LaunchOptions& options, bool outputs) {
    Plan plan{};
    plan.launch.args = args;
    plan.launch.C = int(args.C);
    plan.launch.debug = options.debug;
    plan.dtype = args.logits[0].dtype;
    for (int k = 0; k < args.K; ++k) plan.mixed = plan.mixed || args.logits[k].dtype != plan.dtype;
    for (int k = 0; k < args.K; ++k) {
        const Matrix grad = dense(args.grads[k], args.C, args.S, args.logits[k].dtype);
        plan.launch.wide[k] = !plan.mixed && (!outputs || aligned_alike({&args.logits[k], &grad}, args.N, args.S));
    }
    return plan;
}

template <class T>
RowGrid grid_of(Plan& plan, int64_t rows) {
    const RowGrid g = row_grid(rows, plan.launch.C, kVector<T>, device_limits());
    plan.launch.warp_per_row = g.warp_per_row;
    return g;
}

}  // namespace

void confidence_forward(const ConfidenceArgs& args, const LaunchOptions& options) {
    if (args.N == 0 && !args.inverse_valid) return;
    Plan plan = plan_of(args, options, false);
    with_element(plan.dtype, plan.mixed, [&](auto element) {
        using T = decltype(element);
        const RowGrid g = grid_of<T>(plan, args.N);
        const int shared = int(sizeof(ConfidenceRow)) * (g.warp_per_row ? g.threads / kWarpThreads : 1);
        launch_kernel(&confidence_fwd_kernel<T>, {g.blocks, g.threads, 1, shared}, plan.launch, options);
    });
}

void confidence_backward(const ConfidenceArgs& args, const LaunchOptions& options) {
    if (args.N == 0) return;
    Plan plan = plan_of(args, options, true);
    with_element(plan.dtype, plan.mixed, [&](auto element) {
        using T = decltype(element);
        const RowGrid g = grid_of<T>(plan, args.N * args.K);
        launch_kernel(&confidence_bwd_kernel<T>, {g.blocks, g.threads, 1, 0}, plan.launch, options);
    });
}

}  // namespace camkd::cuda
