// The CPU kernels: one set per instruction set, picked at run time.
#pragma once

#include "../ops.h"

namespace camkd::cpu {

// One instruction set's kernels; `threads` is the most that a call may use.
struct Kernels {
    const char* name;
    void (*row_loss)(const RowLossArgs&, int threads);
    void (*scale_rows)(const ScaleRowsArgs&, int threads);
    void (*confidence_forward)(const ConfidenceArgs&, int threads);
    void (*confidence_backward)(const ConfidenceArgs&, int threads);
    void (*features)(const FeatureArgs&, int threads);
};

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;

// The best set for this processor, or the one that CAMKD_FAST_ISA names. Throws std::runtime_error if that cannot run.
const Kernels& kernels();

}  // namespace camkd::cpu
