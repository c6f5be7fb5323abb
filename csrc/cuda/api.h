// The CUDA kernels' launchers. They neither allocate nor synchronise, so every call can be captured in a CUDA graph.
#pragma once

#include "../ops.h"

namespace camkd::cuda {

// Where and how to launch. `debug` asserts on the device that labels are valid.
struct LaunchOptions {
    void* stream;  // a cudaStream_t of the current device
    bool debug;
};

void row_loss(const RowLossArgs&, const LaunchOptions&);
void scale_rows(const ScaleRowsArgs&, const LaunchOptions&);
void confidence_forward(const ConfidenceArgs&, const LaunchOptions&);
void confidence_backward(const ConfidenceArgs&, const LaunchOptions&);
// `arrivals`: a zero in device memory, left zero, which no other launch uses at the same time. With it the last block
// adds up; without (null) a second launch does.
void features(const FeatureArgs&, uint32_t* arrivals, const LaunchOptions&);

}  // namespace camkd::cuda
