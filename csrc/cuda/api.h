// The CUDA kernels' launchers. They neither allocate nor synchronise, so every call can be captured in a CUDA graph.
#pragma once

#include "../ops.h"
#include "launch_table.h"

namespace camkd::cuda {

// Makes a device the current one, and returns the one before.
int exchange_device(int index);
// Makes it the current one again. For destructors: an error of the device has been reported by what failed.
void return_to_device(int index) noexcept;

// Numbers that a launch for N rows may write to BatchOutput::others, on the current device.
int64_t batch_floats(int64_t N);

// Kernels count the columns of a row in 32 bits, with room for the last vector; rows and elements in 64.
constexpr int64_t kMostColumns = INT32_MAX - 64 * 1024;

// Where and how to launch. `debug` asserts on the device that labels are valid.
struct LaunchOptions {
    void* stream;  // a cudaStream_t of the current device
    bool debug;
};

void row_loss(const RowLossArgs&, const LaunchOptions&);
// What row_loss tries from now on, and the geometry of its last launch since then. For measurements by one thread.
void try_geometry(const RowTrial&);
RowGeometry tried_geometry();
void any_formula(const RowLossArgs&, const LaunchOptions&);  // its part for formulas that are not the paper's; N > 0
void scale_rows(const ScaleRowsArgs&, const LaunchOptions&);
void confidence_forward(const ConfidenceArgs&, const LaunchOptions&);
void confidence_backward(const ConfidenceArgs&, const LaunchOptions&);
void features(const FeatureArgs&, const LaunchOptions&);

}  // namespace camkd::cuda
