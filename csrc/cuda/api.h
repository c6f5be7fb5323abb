// What the CUDA kernels take and which of them there are. Raw pointers, sizes and strides in elements; `stream` is a
// cudaStream_t. Launchers neither allocate nor synchronise, so every call can be captured in a CUDA graph.
#pragma once

#include <cstdint>

#include "../matrix.h"
#include "../row_math.h"

namespace camkd::cuda {

constexpr int kMaxStreams = kMaxTeachers + 1;  // of a row: the student is stream 0

// Where the means over the rows that are not ignored go; null for none. With them the residual is divided by how many
// there are, at least 1.
struct Mean {
    float* loss;
    float* others;  // (3): hard, soft, 1 / rows that count
};

struct RowLossArgs {
    int64_t N, inner;
    int C, K;
    Matrix streams[kMaxStreams];
    const int64_t* target;
    int64_t ignore_index;
    Formula formula;
    const float* weights;  // (K, N) when formula.weighting is `given`
    int64_t weight_stride_k, weight_stride_n;
    float* numbers;                // (3 + 3K, N): loss, hard, soft, divergence, teacher_ce, weights
    void* residual;                // (N, C) contiguous in the student's type, or null
    float residual_scale;          // times ...
    const float* residual_factor;  // ... one element on the device, or null for 1
    Mean mean;
    bool debug;
};

struct ScaleRowsArgs {
    int64_t N;
    int C;
    const void* residual;  // (N, C) contiguous
    void* out;             // (N, C) contiguous, may be `residual`
    DType dtype;
    const float* factor;    // (1) or (N)
    int64_t factor_stride;  // 0 or 1
};

struct ConfidenceArgs {
    int64_t N, inner;
    int C, K;
    Matrix logits[kMaxTeachers];
    const int64_t* target;
    int64_t ignore_index;
    float* weights;             // (K, N), forward only
    float* ce;                  // (K, N), forward only
    float* lse;                 // (K, N): written by forward, read by backward
    const float* grad_ce;       // (K, N), backward only
    void* grads[kMaxTeachers];  // (N, C) contiguous each, backward only
    bool debug;
};

struct FeatureArgs {
    int64_t N;
    int K;
    int M[kMaxTeachers];
    Matrix student[kMaxTeachers], teacher[kMaxTeachers];
    float* error;               // (K, N), forward only
    const float* grad_error;    // (K, N), backward only
    void* grads[kMaxTeachers];  // (N, M_k) contiguous in the student's type, backward only
};

using Stream = void*;

void row_loss(const RowLossArgs&, Stream);
void scale_rows(const ScaleRowsArgs&, Stream);
void confidence_forward(const ConfidenceArgs&, Stream);
void confidence_backward(const ConfidenceArgs&, Stream);
void feature_forward(const FeatureArgs&, Stream);
void feature_backward(const FeatureArgs&, Stream);

}  // namespace camkd::cuda
