// The calls of the CUDA runtime, in runtime.cpp. A C++ compiler reads that file once; nvcc would read the standard
// library's headers three times for every kernel file.
#pragma once

#include "api.h"
#include "launch_table.h"

namespace camkd::cuda {

struct LaunchConfig {
    int64_t blocks;
    int threads, cluster, shared;
    int group = 0;          // blocks that share a row, see device.cuh; 0: there are no groups
    bool together = false;  // all blocks run at once
};

// Queries the driver once per device.
const Limits& device_limits();

// Blocks of this launch that are resident at once on the current device; 0 if a cluster of this size never fits.
// Queries the driver once per configuration, and sets the kernel's attributes that the configuration needs.
int64_t resident_blocks_of(const void* kernel, const LaunchConfig& config);

void launch_address(const void* kernel, const LaunchConfig& config, void* launch, const LaunchOptions& options);

// The address of a variable in the current device's memory.
void* address_of_variable(const void* variable);

// A number below `slots` that no other launch on the current device uses before this one has ended; -1 if there is
// none. Each pool has its own numbers.
enum class SlotPool { counters, memories };
int launch_slot(const LaunchOptions& options, SlotPool pool, int slots);

}  // namespace camkd::cuda
