// Entry point of the logit loss: checks how rows are aligned and picks the element type.
#include "launch.cuh"

namespace camkd::cuda {
namespace {

// One for each stream, and one for each launch in a CUDA graph. 2 MB.
constexpr int kGroupMemories = 16;
CAMKD_GLOBAL GroupMemory group_memories[kGroupMemories];

Temperature temperature_of(float T) {
    return {float(1.4426950408889634 / T), float(T / 1.4426950408889634), temperature_power(T)};
}

}  // namespace

GroupMemory* group_memory_for(const LaunchOptions& options) {
    const int slot = launch_slot(options, SlotPool::memories, kGroupMemories);
    return slot < 0 ? nullptr : static_cast<GroupMemory*>(device_address(group_memories)) + slot;
}

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
