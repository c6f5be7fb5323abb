// Entry of the logit loss: which element type, and how rows are aligned.
#include "row_loss_launch.cuh"

namespace camkd::cuda {
namespace {

Temperature temperature_of(float T) {
    const int power = T == 1 || T == 2 || T == 4 ? int(T) : 0;
    return {float(1.4426950408889634 / T), float(T / 1.4426950408889634), power};
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
