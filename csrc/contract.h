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

enum class Weighting : int { confidence = 0, uniform = 1, entropy = 2, given = 3 };
constexpr const char* kWeightingNames[] = {"confidence", "uniform", "entropy"};  // `given` is a tensor, not a name

// N rows with unit column stride; row n starts at (n / S) * stride_outer + (n % S) * stride_inner, in elements.
struct Matrix {
    const void* data;
    int64_t stride_outer, stride_inner;
    DType dtype;
};

// The constants of the logit loss, camkd_fast/losses/formula.py.
struct Formula {
    float temperature;
    float hard_weight;
    float soft_weight;
    Weighting weighting;
    int64_t ignore_index;
};

// T if e^x can be computed from e^{x/T} by multiplication, else 0.
CAMKD_HD int temperature_power(float T) {
    return T == 1 || T == 2 || T == 4 ? int(T) : 0;
}

// Rows of the (3 + 3K, N) tensor `row_stats`.
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

CAMKD_HD int count(int K) {
    return per_teacher + 3 * K;
}

}  // namespace row_stats
}  // namespace camkd
