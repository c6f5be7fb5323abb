// What the CPU kernels take and which of them there are. Raw pointers, sizes and strides in elements: no framework
// type.
#pragma once

#include <cstdint>

#include "../matrix.h"
#include "../row_math.h"

namespace camkd::cpu {

struct RowLossArgs {
    int64_t N, C, inner;
    int K;
    Matrix student;
    Matrix teachers[kMaxTeachers];
    const int64_t* target;
    int64_t ignore_index;
    Formula formula;
    const float* weights;  // (K, N) when formula.weighting is `given`
    int64_t weight_stride_k, weight_stride_n;
    float* rows;         // (3, N): loss, hard, soft
    float* divergence;   // (K, N)
    float* teacher_ce;   // (K, N)
    float* weights_out;  // (K, N)
    void* residual;      // (N, C) contiguous in the student's type, or null
    float residual_scale;
    int threads;
};

struct ScaleRowsArgs {
    int64_t N, C;
    const void* residual;  // (N, C) contiguous
    void* out;             // (N, C) contiguous, may be `residual`
    DType dtype;
    const float* factor;    // (1) or (N)
    int64_t factor_stride;  // 0 or 1
    int threads;
};

struct ConfidenceArgs {
    int64_t N, C, inner;
    int K;
    Matrix logits[kMaxTeachers];
    const int64_t* target;
    int64_t ignore_index;
    float* weights;             // (K, N), forward only
    float* ce;                  // (K, N), forward only
    float* lse;                 // (K, N): written by forward, read by backward
    const float* grad_ce;       // (K, N), backward only
    void* grads[kMaxTeachers];  // (N, C) contiguous each, backward only
    int threads;
};

struct FeatureArgs {
    int64_t N, M;
    Matrix student, teacher;
    float* error;             // (N), forward only
    const float* grad_error;  // (N), backward only
    void* grad;               // (N, M) contiguous in the student's type, backward only
    int threads;
};

// One instruction set's kernels.
struct Kernels {
    const char* name;
    void (*row_loss)(const RowLossArgs&);
    void (*scale_rows)(const ScaleRowsArgs&);
    void (*confidence_forward)(const ConfidenceArgs&);
    void (*confidence_backward)(const ConfidenceArgs&);
    void (*feature_forward)(const FeatureArgs&);
    void (*feature_backward)(const FeatureArgs&);
};

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;

// The best that this processor runs, or the one that CAMKD_FAST_ISA names. Throws std::runtime_error if it cannot.
const Kernels& kernels();

}  // namespace camkd::cpu
