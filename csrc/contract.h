// What Python and the compiled kernels must agree on, once for CPU and CUDA: names, codes, limits and memory layout.
// camkd_fast/backends/compiled.py asserts the exported values (python/bindings.cpp) on import.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
// Always inlined: with a compile-time number of teachers all arrays become registers.
#define CAMKD_HD __host__ __device__ __forceinline__
#define CAMKD_HD_MEMBER static __host__ __device__ __forceinline__
#else
// Internal linkage: each instruction set compiles its own copy, and the linker must not pick one for all.
#define CAMKD_HD static inline
#define CAMKD_HD_MEMBER static inline
#endif

namespace camkd {

constexpr int kMaxTeachers = 16;                 // also a multiple of every vector width
constexpr int kMaxStreams = kMaxTeachers + 1;    // rows of logits per sample: the student is stream 0
constexpr int kTemperaturePowers[] = {1, 2, 4};  // temperatures T at which e^x is computed as (e^{x/T})^T

constexpr int64_t kFeatureParts = 4096;  // partial errors of samples that several blocks share, on CUDA

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };
constexpr const char* kDTypeNames[] = {"float32", "bfloat16", "float16"};

enum class Weighting : int { confidence = 0, uniform = 1, entropy = 2, min_ce = 3, given = 4 };
constexpr const char* kWeightingNames[] = {"confidence", "uniform", "entropy", "min_ce"};  // `given` is a tensor

enum class Divergence : int { forward_kl = 0, reverse_kl = 1, jsd = 2, skew = 3 };
constexpr const char* kDivergenceNames[] = {"forward_kl", "reverse_kl", "jsd", "skew"};

// N rows with unit column stride; row n starts at (n / S) * stride_outer + (n % S) * stride_inner, in elements.
struct Matrix {
    const void* data;
    int64_t stride_outer, stride_inner;
    DType dtype;
};

// From what a head computes, x, to a logit: softcap * tanh(scale * x / softcap), or scale * x without a softcap (0).
struct LogitMap {
    float scale = 1, softcap = 0;
};

// The constants of the logit loss, camkd_fast/losses/formula.py.
struct Formula {
    float temperature;
    float hard_weight;
    float soft_weight;
    Weighting weighting;
    int64_t ignore_index;
    Divergence divergence;
    // The parts of teacher and student in the mixture: beta and 1 - beta of jsd, alpha and 1 - alpha of skew.
    float mixture_share, mixture_other;
    bool scale_by_t2;
    float z_loss_weight;
    bool maps;          // whether `logit_maps` are other than the identity
    int teachers_maps;  // how many teachers have a map of their own, 0 for none
    LogitMap logit_maps[kMaxStreams];
    bool entropy;  // row_stats end with the student's entropies
};

// Whether a formula is the paper's: fields up to `ignore_index` are all that count.
CAMKD_HD bool is_basic(const Formula& f) {
    return f.weighting != Weighting::min_ce && f.divergence == Divergence::forward_kl &&
           (f.scale_by_t2 || f.temperature == 1) && f.z_loss_weight == 0 && !f.maps && !f.entropy;
}

// Whether the divergence is of a mixture of student and teacher.
CAMKD_HD bool is_mixture(const Formula& f) {
    return f.divergence == Divergence::jsd || f.divergence == Divergence::skew;
}

// T if e^x can be computed from e^{x/T} by multiplication, else 0.
inline int temperature_power(float T) {
    for (const int power : kTemperaturePowers)
        if (T == float(power)) return power;
    return 0;
}

// The finished sums of a stream (StreamState of row_math.h), and its logit at the label minus the maximum: NaN for
// invalid labels. Of two labels it is the average by their shares. The student's `plogp` is sum e^{d/T} d. `cross` of a
// teacher belongs to the divergence: as in StreamState for the forward KL; sum e^{d_s/T} (d_s - d_z) for the reverse
// KL; for jsd and skew, D itself, and `center` is sum q g (camkd_fast/backends/divergences.py).
template <class F>
struct RowSums {
    F max, sumT, sum1, cross, plogp, label, center;
};
constexpr int kRowSums = int(sizeof(RowSums<float>) / sizeof(float));
constexpr const char* kRowSumNames[kRowSums] = {"max", "sumT", "sum1", "cross", "plogp", "label", "center"};

// The sums as an array, in the order of kRowSumNames.
CAMKD_HD float* as_array(RowSums<float>& sums) {
    return reinterpret_cast<float*>(&sums);
}

// Rows of the tensor `row_stats`: (3 + 3K, N), and one more for the entropies if the formula asks for them.
// kRowStatNames has the rows of one teacher, in order.
constexpr const char* kRowStatNames[] = {"loss", "hard", "soft", "divergence", "teacher_ce", "weight", "entropy"};
namespace row_stats {

constexpr int loss = 0, hard = 1, soft = 2, per_teacher = 3;

CAMKD_HD int divergence(int k) {
    return per_teacher + k;
}

CAMKD_HD int teacher_ce(int K, int k) {
    return per_teacher + K + k;
}

CAMKD_HD int weight(int K, int k) {
    return per_teacher + 2 * K + k;
}

CAMKD_HD int entropy(int K) {
    return per_teacher + 3 * K;
}

CAMKD_HD int count(int K, bool with_entropy = false) {
    return per_teacher + 3 * K + (with_entropy ? 1 : 0);
}

}  // namespace row_stats
}  // namespace camkd
