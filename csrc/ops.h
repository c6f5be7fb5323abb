// The arguments of every compiled operator, once for CPU and CUDA: raw pointers, and sizes and strides in elements.
// Contracts and formulas: camkd_fast/backends/reference.py.
#pragma once

#include <cstdint>

#include "labels.h"

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

// What a call computes of rows of which it has some of the columns only, as where processes share a vocabulary.
enum class Shard : int {
    none = 0,      // all columns are here
    sums = 1,      // the sums over these columns
    mixtures = 2,  // of jsd and skew, given the sums of the whole rows: those over the mixtures, of these columns
    results = 3,   // row_stats, and the gradient of these columns, given all sums of the whole rows
};
constexpr const char* kShardNames[] = {"none", "sums", "mixtures", "results"};

struct RowLossArgs {
    int64_t N, C, S;
    int K;
    Matrix streams[kMaxStreams];  // student, then K teachers
    const int64_t* target;
    SecondLabels second;
    Formula formula;
    const float* weights;  // (K, N) if formula.weighting is `given`
    int64_t weight_stride_k, weight_stride_n;
    float* row_stats;                // (3 + 3K, N), rows as in contract.h
    void* grad_student;              // (N, C) contiguous in the student's dtype, or null
    float grad_scale;                // multiplies the gradient, and so does ...
    const float* grad_scale_device;  // ... one element in device memory; null for 1, and on a CPU
    BatchOutput batch;
    Shard shard;  // of a label outside [0, C) the column is elsewhere, unless this is `none`
    float* sums;  // (K + 1, kRowSums, N): RowSums of contract.h; of a label that is elsewhere NaN
};

CAMKD_HD bool writes_sums(const RowLossArgs& args) {
    return args.shard == Shard::sums || args.shard == Shard::mixtures;
}

// Sum i of stream k in row n.
CAMKD_HD float& sum_of(const RowLossArgs& args, int k, int i, int64_t n) {
    return args.sums[(int64_t(k) * kRowSums + i) * args.N + n];
}

// out = grad * factor * number, row by row.
struct ScaleRowsArgs {
    int64_t N, C;
    const void* grad;  // (N, C) contiguous
    void* out;         // (N, C) contiguous, may be `grad`
    DType dtype;
    const float* factor;    // (1) or (N)
    int64_t factor_stride;  // 0 or 1
    float number = 1;
};

struct ConfidenceArgs {
    int64_t N, C, S;
    int K;
    Matrix logits[kMaxTeachers];
    const int64_t* target;
    SecondLabels second;
    int64_t ignore_index;
    float* weights;             // (K, N), forward only
    float* weights_copy;        // (K, N) or null: what backward reads, since a caller may write to `weights`
    float* ce;                  // (K, N), forward only
    float* lse;                 // (K, N): written by forward, read by backward
    float* inverse_valid;       // 1 / number of rows that are not ignored (at least 1), or null; CUDA forward only
    const float* grad_ce;       // (K, N), backward only: all of d loss / d CE_k, unless `chained`
    const float* grad_weights;  // (K, N): d loss / d w_k; may be null, and so may `grad_ce`, if `chained`
    bool chained;  // backward adds to `grad_ce` what comes through the weights, and leaves out ignored rows
    void* grads[kMaxTeachers];  // (N, C) contiguous each, backward only
};

// d loss / d CE_k of row n (camkd_fast/backends/reference.py, ce_gradient).
CAMKD_HD float ce_gradient(const ConfidenceArgs& args, int k, int64_t n) {
    const int64_t N = args.N;
    if (!args.chained) return args.grad_ce[k * N + n];
    if (args.target[n] == args.ignore_index) return 0.0f;
    const float direct = args.grad_ce ? args.grad_ce[k * N + n] : 0.0f;
    if (!args.grad_weights || args.K == 1) return direct;
    const float others = float(args.K - 1);
    float mean = 0;  // sum_j softmax_j(CE) * grad_weights_j
    for (int j = 0; j < args.K; ++j)
        mean += (1.0f - others * args.weights_copy[j * N + n]) * args.grad_weights[j * N + n];
    const float softmax = 1.0f - others * args.weights_copy[k * N + n];
    return direct - softmax * (args.grad_weights[k * N + n] - mean) / others;
}

// The value (p, q) of sample n is at n * stride_n + p * stride_p + q * stride_q, in elements.
struct FeatureMap {
    const void* data;
    int64_t stride_n, stride_p, stride_q;
    DType dtype;
};

// K pairs of feature maps, whose samples have P x Q values. (p, q) is the memory order of the gradient.
struct FeatureArgs {
    int64_t N;
    int K;
    int64_t P[kMaxTeachers], Q[kMaxTeachers];
    FeatureMap student[kMaxTeachers], teacher[kMaxTeachers];
    const float* weights;  // (K, N); null for the error only
    int64_t weight_stride_k, weight_stride_n;
    float* error;               // (K, N), contiguous, or null; on CUDA kFeatureParts numbers of scratch follow
    float* loss;                // scale * sum of weights * error, or null; needs `error`
    void* grads[kMaxTeachers];  // (N, P, Q) contiguous in the student's dtype, or all null
    float scale, grad_scale;    // `scale` multiplies loss and gradient, `grad_scale` the gradient, and so do ...
    const float* scale_device;  // ... elements in device memory; null for 1, and on a CPU
    const float* grad_scale_device;
};

CAMKD_HD int64_t values_of(const FeatureArgs& args, int k) {
    return args.P[k] * args.Q[k];
}

// True if a sample of both maps of pair k is a dense row in the order of the gradient.
CAMKD_HD bool is_dense(const FeatureArgs& args, int k) {
    return args.P[k] == 1 && args.student[k].stride_q == 1 && args.teacher[k].stride_q == 1;
}

}  // namespace camkd
