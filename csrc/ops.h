// The arguments of every compiled operator, once for CPU and CUDA: raw pointers, and sizes and strides in elements.
// Contracts and formulas: camkd_fast/backends/reference.py.
#pragma once

#include <cstdint>

#include "contract.h"

namespace camkd {

// What the kernel makes of the rows of a minibatch. CUDA only: a CPU caller adds up itself.
struct BatchOutput {
    float* losses;  // (N): a copy of the first row of row_stats, or null
    float* loss;    // the sum of the losses times a factor, or null for neither this nor what follows
    float* others;  // (cuda::batch_floats(N)): the same of hard and soft, the factor; then the kernel's own numbers
    // The factor is 1 / number of rows that are not ignored (at least 1), and the gradient is multiplied by it too;
    // else it is `factor`, which the caller has put into `grad_scale`.
    bool counts;
    float factor;
};

struct RowLossArgs {
    int64_t N, C, S;
    int K;
    Matrix streams[kMaxStreams];  // student, then K teachers
    const int64_t* target;
    Formula formula;
    const float* weights;  // (K, N) if formula.weighting is `given`
    int64_t weight_stride_k, weight_stride_n;
    float* row_stats;                // (3 + 3K, N), rows as in contract.h
    void* grad_student;              // (N, C) contiguous in the student's dtype, or null
    float grad_scale;                // multiplies the gradient, and so does ...
    const float* grad_scale_device;  // ... one element in device memory; null for 1, and on a CPU
    BatchOutput batch;
};

// out = grad * factor, row by row.
struct ScaleRowsArgs {
    int64_t N, C;
    const void* grad;  // (N, C) contiguous
    void* out;         // (N, C) contiguous, may be `grad`
    DType dtype;
    const float* factor;    // (1) or (N)
    int64_t factor_stride;  // 0 or 1
};

struct ConfidenceArgs {
    int64_t N, C, S;
    int K;
    Matrix logits[kMaxTeachers];
    const int64_t* target;
    int64_t ignore_index;
    float* weights;             // (K, N), forward only
    float* ce;                  // (K, N), forward only
    float* lse;                 // (K, N): written by forward, read by backward
    const float* grad_ce;       // (K, N), backward only
    void* grads[kMaxTeachers];  // (N, C) contiguous each, backward only
};

// K pairs of (N, M_k) matrices.
struct FeatureArgs {
    int64_t N;
    int K;
    int64_t M[kMaxTeachers];
    Matrix student[kMaxTeachers], teacher[kMaxTeachers];
    float* error;               // (K, N), forward only
    const float* grad_error;    // (K, N), backward only
    void* grads[kMaxTeachers];  // (N, M_k) contiguous in the student's dtype, backward only
};

}  // namespace camkd
