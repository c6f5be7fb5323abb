// Launcher of the logit loss.
#include "row_loss.cuh"

#include <cmath>

#include "launch.h"

namespace camkd::cuda {
namespace {

Temperature temperature_of(float T) {
    const int power = T == 1 || T == 2 || T == 4 ? int(T) : 0;
    return {float(1.4426950408889634 / T), power};
}

template <class T, bool WarpTeams>
auto kernel_of(const RowLaunch& launch) {
    // 16-bit logits need every instruction saved; for fp32, twice as long on its way from memory, a kernel less to
    // compile.
    if constexpr (sizeof(T) == 2) {
        if (launch.temperature.power == kUsualPower && launch.args.formula.weighting != Weighting::entropy)
            return &row_loss_kernel<T, WarpTeams, true>;
    }
    return &row_loss_kernel<T, WarpTeams, false>;
}

template <class T>
void launch_row_loss(RowLaunch& launch, Stream stream) {
    const RowLossArgs& args = launch.args;
    RowProblem problem{};
    problem.N = args.N;
    problem.C = args.C;
    problem.K = args.K;
    // A row that does not begin at a 16-byte boundary touches one vector more.
    const Matrix boundary{nullptr, 0, 0, args.streams[0].dtype};
    const bool shifted = launch.wide_in && !aligned_alike({&args.streams[0], &boundary}, args.N, args.inner);
    problem.vectors = int(ceil_div(int64_t(args.C) + (shifted ? kVector<T> - 1 : 0), kVector<T>));
    problem.row_bytes = RowShared::row_bytes;
    problem.warp_bytes = problem.block_bytes = RowShared::states_bytes(args.K);
    problem.wants_mean = args.mean.loss != nullptr;
    Limits limits = device_limits();
    RowGeometry& g = launch.geometry;
    void (*kernel)(RowLaunch) = nullptr;
    for (;; limits.cluster /= 2) {
        g = row_geometry(problem, limits);
        kernel = g.warp_teams ? kernel_of<T, true>(launch) : kernel_of<T, false>(launch);
        const int64_t resident = resident_blocks(kernel, {g.blocks, g.threads, g.cluster, g.shared});
        // A device may lack room for its largest clusters: parts of it can be switched off, or given to others.
        if (resident == 0 && g.cluster > 1) continue;
        limit_grid(g, resident);
        break;
    }
    launch.alone = problem.wants_mean && g.warp_teams && g.blocks == g.cluster;
    const bool apart = problem.wants_mean && !launch.alone;
    if (apart) count_rows(args, stream);
    launch_kernel(kernel, {g.blocks, g.threads, g.cluster, g.shared}, launch, stream);
    if (apart) average_rows(args, stream);
}

}  // namespace

void row_loss(const RowLossArgs& args, Stream stream) {
    if (args.N == 0) {
        if (!args.mean.loss) return;
        count_rows(args, stream);
        average_rows(args, stream);
        return;
    }
    RowLaunch launch{};
    launch.args = args;
    launch.temperature = temperature_of(args.formula.temperature);
    const Matrix* inputs[kMaxStreams];
    bool mixed = false;
    for (int k = 0; k <= args.K; ++k) {
        inputs[k] = &args.streams[k];
        mixed = mixed || args.streams[k].dtype != args.streams[0].dtype;
    }
    launch.wide_in = !mixed && aligned_alike(inputs, args.K + 1, args.N, args.inner);
    const Matrix residual = dense(args.residual, args.C, args.inner, args.streams[0].dtype);
    launch.wide_out = launch.wide_in && aligned_alike({&args.streams[0], &residual}, args.N, args.inner);
    with_element(args.streams[0].dtype, mixed,
                 [&](auto element) { launch_row_loss<decltype(element)>(launch, stream); });
}

}  // namespace camkd::cuda
