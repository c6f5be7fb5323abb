// The part of csrc/cuda/launch.h that depends on the CUDA runtime, for the emulated device. The tests set its limits.
#pragma once

namespace camkd::cuda {

namespace host {

inline Limits limits{2, 96 * 1024, 200 * 1024, 1 << 20, 16, 64, 0, 0};
inline RowGeometry last_rows{};  // of the last launch of row_loss
inline bool separate = false;    // there are no counters, so that launches of their own add up a minibatch

}  // namespace host

inline const Limits& device_limits() {
    return host::limits;
}

struct LaunchConfig {
    int64_t blocks;
    int threads, cluster, shared;
    int group = 0;
    bool together = false;
};

constexpr int kResidentTogether = 1;  // blocks on a multiprocessor

template <class Launch>
int64_t resident_blocks(void (*)(const Launch), const LaunchConfig& config) {
    return int64_t(host::limits.multiprocessors) * (config.together ? kResidentTogether : config.cluster);
}

template <class Launch>
void launch_kernel(void (*kernel)(const Launch), const LaunchConfig& config, const Launch& launch,
                   const LaunchOptions&) {
    if (config.shared > host::limits.shared_per_block || config.blocks % config.cluster != 0 || config.blocks < 1)
        throw std::runtime_error("camkd_fast: launch: impossible configuration");
    if constexpr (requires { launch.geometry.chunks; }) host::last_rows = launch.geometry;
    const bool before = host::together;
    host::together = before || config.together;
    host::group_size = config.group > 0 ? config.group : int(config.blocks);
    host::run(config.blocks, config.cluster, config.threads, config.shared, [&] { kernel(launch); });
    host::together = before;
}

template <class Variable>
void* device_address(Variable& variable) {
    return &variable;
}

enum class SlotPool { counters, memories };

inline int launch_slot(const LaunchOptions&, SlotPool pool, int) {
    return host::separate && pool == SlotPool::counters ? -1 : 0;
}

}  // namespace camkd::cuda
