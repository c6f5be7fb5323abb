// Launcher of the logit loss for formulas that are not the paper's.
#include "../launch.h"
#include "kernel.cuh"

namespace camkd::cuda {
namespace {

template <class T>
void launch_any_formula(FormulaLaunch& launch, const LaunchOptions& options) {
    const RowLossArgs& args = launch.args;
    const RowGrid g = row_grid(args.N, launch.C, kVector<T>, device_limits());
    launch.warp_per_row = g.warp_per_row;
    LaunchConfig config{g.blocks, g.threads, 1, FormulaShared::bytes(g.threads, g.warp_per_row, args.K)};
    // Blocks wait for each other's labels, so no more than run at once
    config.blocks = std::clamp<int64_t>(resident_blocks(&any_formula_kernel<T>, config), 1, g.blocks);
    launch.labels_per_block = ceil_div(args.N, config.blocks);
    launch.counters = args.batch.loss ? counters_for(options) : nullptr;
    const bool separate_kernels = args.batch.loss && !launch.counters;
    if (separate_kernels) count_rows(args, options);
    launch_kernel(&any_formula_kernel<T>, config, launch, options);
    if (separate_kernels) add_up_rows(args, options);
}

}  // namespace

void any_formula(const RowLossArgs& args, const LaunchOptions& options) {
    FormulaLaunch launch{};
    launch.args = args;
    launch.C = int(args.C);
    launch.debug = options.debug;
    launch.temperature = temperature_of(args.formula.temperature);
    const RowAccess access = row_access(args);
    launch.wide_in = access.wide_in;
    launch.wide_out = access.wide_out;
    with_element(args.streams[0].dtype, access.mixed,
                 [&](auto element) { launch_any_formula<decltype(element)>(launch, options); });
}

}  // namespace camkd::cuda
