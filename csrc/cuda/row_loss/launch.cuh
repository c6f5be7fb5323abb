// Launcher of the logit loss for one element type: picks the kernel and its geometry. f32.cu, bf16.cu and f16.cu
// compile one instantiation each.
#pragma once

#include "../launch.h"
#include "kernel.cuh"
#include "pipeline.cuh"
#include "warp_rows.cuh"

namespace camkd::cuda {

// The kernel for this number of teachers, or the general one (0).
template <class T>
auto kernel_for(const RowLaunch& launch, int fixed_k) {
    return with_fixed_k(fixed_k, [&](auto teachers) {
        constexpr int K = decltype(teachers)::value;
        if constexpr (K > 0) {
            if (launch.geometry.pipelined) return &pipelined_kernel<T, K>;
            if (launch.geometry.warp_per_row && rows_alike(launch)) return &warp_rows_kernel<T, K>;
        }
        return launch.geometry.warp_per_row ? &row_loss_kernel<T, true, K> : &row_loss_kernel<T, false, K>;
    });
}

// The memory for a cooperative group's messages, or null if others have taken all.
GroupMemory* group_memory_for(const LaunchOptions&);

inline LaunchConfig config_of(const RowGeometry& g) {
    const int threads = g.threads + (g.pipelined ? kHelperWarps * kWarpThreads : 0);
    return {g.blocks,
            threads,
            g.cooperative ? 1 : g.blocks_per_group,
            g.shared,
            g.warp_per_row ? 0 : g.blocks_per_group,
            g.cooperative};
}

template <class T>
void launch_row_loss(RowLaunch& launch, const LaunchOptions& options, const RowTrial& trial) {
    const RowLossArgs& args = launch.args;
    RowProblem problem{};
    problem.N = args.N;
    problem.C = launch.C;
    problem.K = args.K;
    // A row that does not begin at a 16-byte boundary touches one more vector
    const Matrix boundary{nullptr, 0, 0, args.streams[0].dtype};
    const bool shifted = launch.wide_in && !aligned_alike({&args.streams[0], &boundary}, args.N, args.S);
    launch.even = launch.wide_in && !shifted && args.C % kVector<T> == 0;
    problem.vectors = int(ceil_div(int64_t(args.C) + (shifted ? kVector<T> - 1 : 0), kVector<T>));
    problem.vector = kVector<T>;
    problem.needs_mean = args.batch.loss != nullptr;
    const bool common_case = launch.temperature.power != 0 && args.formula.weighting != Weighting::entropy;
    problem.fixed_k = common_case && args.K <= kMaxFixedK ? args.K : 0;
    RowShared::measure(problem, args.second.target != nullptr);
    Limits limits = device_limits();
    RowGeometry& g = launch.geometry;
    void (*kernel)(RowLaunch) = nullptr;
    for (;;) {
        g = row_geometry(problem, limits, trial);
        launch.memory = g.cooperative ? group_memory_for(options) : nullptr;
        kernel = kernel_for<T>(launch, problem.fixed_k);
        const int64_t resident = resident_blocks(kernel, config_of(g));
        // A device may have no room for its largest clusters and cooperative groups: parts of it can be disabled or
        // assigned to others
        if (g.cooperative && (!launch.memory || resident < g.blocks_per_group)) {
            limits.least_cooperative = 0;
        } else if (g.blocks_per_group > 1 && resident == 0) {
            limits.cluster /= 2;
        } else {
            limit_grid(g, g.cooperative ? std::min(resident, group_blocks(problem)) : resident);
            break;
        }
    }
    RowShared::lay_out(launch, problem);
    launch.single_cluster = problem.needs_mean && g.warp_per_row && g.blocks == g.blocks_per_group;
    launch.counters = problem.needs_mean && !launch.single_cluster ? counters_for(options) : nullptr;
    launch.labels_per_block = ceil_div(args.N, g.blocks);
    const bool separate_kernels = problem.needs_mean && !launch.single_cluster && !launch.counters;
    if (separate_kernels) count_rows(args, options);
    launch_kernel(kernel, config_of(g), launch, options);
    if (separate_kernels) add_up_rows(args, options);
}

extern template void launch_row_loss<float>(RowLaunch&, const LaunchOptions&, const RowTrial&);
extern template void launch_row_loss<bf16>(RowLaunch&, const LaunchOptions&, const RowTrial&);
extern template void launch_row_loss<f16>(RowLaunch&, const LaunchOptions&, const RowTrial&);

}  // namespace camkd::cuda
