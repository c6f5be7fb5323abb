// Entry point of the logit loss: checks how rows are aligned and picks the element type.
#include "launch.cuh"

namespace camkd::cuda {
namespace {

Temperature temperature_of(float T) {
    return {float(1.4426950408889634 / T), float(T / 1.4426950408889634), temperature_power(T)};
}

}  // namespace

void row_loss(const RowLossArgs& args, const LaunchOptions& options) {
    if (args.N == 0) {
        if (!args.batch.loss) return;
        count_rows(args, options);
        add_up_rows(args, options);
        return;
    }
    RowLaunch launch{};
    launch.args = args;
    launch.C = int(args.C);
    launch.debug = options.debug;
    launch.temperature = temperature_of(args.formula.temperature);
    const Matrix* inputs[kMaxStreams];
    bool mixed = false;
    for (int k = 0; k <= args.K; ++k) {
        inputs[k] = &args.streams[k];
        mixed = mixed || args.streams[k].dtype != args.streams[0].dtype;
    }
    launch.wide_in = !mixed && aligned_alike(inputs, args.K + 1, args.N, args.S);
    const Matrix grad = dense(args.grad_student, args.C, args.S, args.streams[0].dtype);
    launch.wide_out = launch.wide_in && aligned_alike({&args.streams[0], &grad}, args.N, args.S);
    with_element(args.streams[0].dtype, mixed,
                 [&](auto element) { launch_row_loss<decltype(element)>(launch, options); });
}

}  // namespace camkd::cuda
