// Entry point of the logit loss: picks the kernel for the formula and the element type.
#include "launch.cuh"

namespace camkd::cuda {
namespace {

// One for each stream, and one for each launch in a CUDA graph. 4 MB.
constexpr int kGroupMemories = 32;
CAMKD_GLOBAL GroupMemory group_memories[kGroupMemories];

RowTrial trial{};
RowGeometry tried{};

}  // namespace

void try_geometry(const RowTrial& next) {
    const bool rows = next.rows == 0 || (next.rows >= kSummedAhead && next.rows <= kMostInPipeline);
    if (!rows || next.gradients < 0 || next.gradients > kSummedAhead)
        throw std::invalid_argument("camkd_fast: a trial of " + std::to_string(next.rows) + " rows in flight, " +
                                    std::to_string(next.gradients) + " gradients at once; possible are " +
                                    std::to_string(kSummedAhead) + " to " + std::to_string(kMostInPipeline) +
                                    ", 1 to " + std::to_string(kSummedAhead));
    trial = next;
}

RowGeometry tried_geometry() {
    return tried;
}

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
    if (args.shard != Shard::none || !is_basic(args.formula)) return any_formula(args, options);
    RowLaunch launch{};
    launch.args = args;
    launch.C = int(args.C);
    launch.debug = options.debug;
    launch.temperature = temperature_of(args.formula.temperature);
    const RowAccess access = row_access(args);
    launch.wide_in = access.wide_in;
    launch.wide_out = access.wide_out;
    with_element(args.streams[0].dtype, access.mixed,
                 [&](auto element) { launch_row_loss<decltype(element)>(launch, options, trial); });
    if (trial.any()) tried = launch.geometry;
}

}  // namespace camkd::cuda
