// The fast path: the passes of passes.cuh with the number of teachers and the power as compile-time constants. All of a
// thread's data is in registers, and within a row there are branches only for rare cases.
#pragma once

#include "passes.cuh"

namespace camkd::cuda {

// Calls f with the power as a compile-time constant.
template <int P>
struct Power {
    static constexpr int value = P;
};
template <class F>
CAMKD_DEVICE void with_power(int power, F f) {
    if (power == 4)
        f(Power<4>());
    else if (power == 2)
        f(Power<2>());
    else
        f(Power<1>());
}

// sum + e^P; the last multiplication is fused with the addition.
template <int P>
CAMKD_DEVICE float add_raised(float sum, float e) {
    if (P == 1) return sum + e;
    if (P == 4) e *= e;
    return fmaf(e, e, sum);
}

// Smallest power of two >= N.
template <int N>
constexpr int power_of_two = 2 * power_of_two<(N + 1) / 2>;
template <>
constexpr int power_of_two<1> = 1;

// Folds N numbers of every lane across the warp; the result for number i is in lane i * fold_stride<N>. Each exchange
// halves the numbers that are left, while N separate folds would exchange all of them five times.
template <int N>
constexpr int fold_stride = kWarp / power_of_two<N>;

// Lanes with `bit` keep the upper half of 2n numbers and the others the lower half, until one is left.
template <int n, int bit, int P, class Op>
CAMKD_DEVICE void fold_halves(float (&y)[P], int lane, Op op) {
    if constexpr (n >= 1) {
        const bool upper = lane & bit;
#pragma unroll
        for (int i = 0; i < n; ++i) {
            const float a = y[i],
                        b = y[i + n];  // by value: a select between elements would put the array in local memory
            y[i] = op(upper ? b : a, shuffle_xor(upper ? a : b, bit));
        }
        fold_halves<n / 2, bit / 2>(y, lane, op);
    } else if constexpr (bit >= 1) {
        y[0] = op(y[0], shuffle_xor(y[0], bit));
        fold_halves<0, bit / 2>(y, lane, op);
    }
}

template <int N, class Op>
CAMKD_DEVICE float warp_fold(const float (&x)[N], int lane, float neutral, Op op) {
    constexpr int P = power_of_two<N>;
    float y[P];
#pragma unroll
    for (int i = 0; i < P; ++i) y[i] = i < N ? x[i < N ? i : 0] : neutral;
    fold_halves<P / 2, kWarp / 2>(y, lane, op);
    return y[0];
}

// The maxima of K + 1 streams over the warp, in every lane.
template <class T, int K>
CAMKD_DEVICE void fixed_k_maxima(const RowBuffer& buffer, const Chunk& chunk, int lane, float (&max)[K + 1]) {
    Pack top[K + 1];
#pragma unroll
    for (int k = 0; k <= K; ++k) top[k] = lowest_pack<T>();
#pragma unroll 1
    for (int i = 0; i < chunk.held; ++i) {
#pragma unroll
        for (int k = 0; k <= K; ++k) top[k] = max_pack<T>(top[k], *buffer.slot(k, chunk.begin + i));
    }
#pragma unroll
    for (int k = 0; k <= K; ++k) max[k] = highest<T>(top[k]);
    const float folded = warp_fold(max, lane, -INFINITY, [](float a, float b) { return fmaxf(a, b); });
#pragma unroll
    for (int k = 0; k <= K; ++k) max[k] = shuffle(folded, k * fold_stride<K + 1>);
}

// The sums of one stream; a thread has kSums for the student and then for each teacher.
enum Sum { kSumT, kSum1, kCross, kSums };

// x[k] for a k that is not a compile-time constant, without an array in local memory.
template <int N>
CAMKD_DEVICE float element_at(const float (&x)[N], int k) {
    float y = x[0];
#pragma unroll
    for (int i = 1; i < N; ++i) {
        const float z = x[i];
        if (i == k) y = z;
    }
    return y;
}

// Sums over the thread's vectors, relative to the references `at`.
template <class T, int K, int P>
CAMKD_DEVICE void fixed_k_sums(const RowBuffer& buffer, const Chunk& chunk, float scale, const float (&at)[K + 1],
                               float (&sums)[kSums * (K + 1)]) {
    constexpr int V = kVector<T>;
#pragma unroll 1
    for (int i = 0; i < chunk.held; ++i) {
        float s[V], cross[K], check = 0;
        Elements<T>::unpack(*buffer.slot(0, chunk.begin + i), s);
        Reference::scale_from(at[0], scale, s);
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const float e = exp2_fast(s[j]);
            sums[kSumT] += e;
            sums[kSum1] = add_raised<P>(sums[kSum1], e);
        }
#pragma unroll
        for (int k = 0; k < K; ++k) {
            float* const of = sums + kSums * (k + 1);
            float z[V];
            Elements<T>::unpack(*buffer.slot(k + 1, chunk.begin + i), z);
            Reference::scale_from(at[k + 1], scale, z);
            cross[k] = 0;
#pragma unroll
            for (int j = 0; j < V; ++j) {
                const float e = exp2_fast(z[j]);
                of[kSumT] += e;
                of[kSum1] = add_raised<P>(of[kSum1], e);
                cross[k] = fmaf(e, z[j] - s[j], cross[k]);
            }
            check += cross[k];
        }
        if (check != check) {
            // Probability 0 contributes 0, even where the difference is infinite
#pragma unroll 1
            for (int k = 0; k < K; ++k) {
                float z[V], e[V];
                Elements<T>::unpack(*buffer.slot(k + 1, chunk.begin + i), z);
                Reference::scale_from(element_at(at, k + 1), scale, z);
                exps(z, e);
                const float careful = cross_term(e, z, s);
#pragma unroll
                for (int g = 0; g < K; ++g)
                    if (g == k) cross[g] = careful;
            }
        }
#pragma unroll
        for (int k = 0; k < K; ++k) sums[kSums * (k + 1) + kCross] += cross[k];
    }
}

// The references and coefficients of a row in registers.
template <int K>
struct FixedKRow {
    float at[K + 1];
    float studentT, student1, teacher[K];

    CAMKD_DEVICE FixedKRow(const Reference* references, const GradCoefficients<float>& coefficients) {
        studentT = coefficients.studentT;
        student1 = coefficients.student1;
#pragma unroll
        for (int k = 0; k <= K; ++k) at[k] = references[k].at;
#pragma unroll
        for (int k = 0; k < K; ++k) teacher[k] = coefficients.teacher[k];
    }
};

// The vector of the gradient for slot `slot`. `label` as in general_grad_vector.
template <class T, int K>
CAMKD_DEVICE void fixed_k_grad_vector(const RowBuffer& buffer, int slot, const Temperature& temperature,
                                      const FixedKRow<K>& row, int label, float at_label, float (&out)[kVector<T>]) {
    constexpr int V = kVector<T>;
    float x[V], e[V];
    Elements<T>::unpack(*buffer.slot(0, slot), x);
    Reference::scale_from(row.at[0], temperature.scale, x);
    exps(x, e);
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = row.studentT * e[j];
#pragma unroll
    for (int k = 0; k < K; ++k) {
        Elements<T>::unpack(*buffer.slot(k + 1, slot), x);
        Reference::scale_from(row.at[k + 1], temperature.scale, x);
#pragma unroll
        for (int j = 0; j < V; ++j) out[j] = fmaf(-row.teacher[k], exp2_fast(x[j]), out[j]);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) e[j] = temperature.raise(e[j]);
    if (unsigned(label) < unsigned(V)) {
        // Soft and hard part separately: added to the label's 1, each of K small terms would be rounded to its scale.
#pragma unroll
        for (int j = 0; j < V; ++j) out[j] += row.student1 * e[j] - (j == label ? at_label : 0.0f);
    } else {
#pragma unroll
        for (int j = 0; j < V; ++j) out[j] = fmaf(row.student1, e[j], out[j]);
    }
}

// Merges the states of up to 32 parts of a row, one per lane: calls load(lane, k) for each stream and put(k, field,
// value) for each of its numbers, where `field` counts the members of StreamState without plogp.
template <int K, class Load, class Put>
CAMKD_DEVICE void fixed_k_merge(int lane, int parts, float scale, Load load, Put put) {
    State states[K + 1];
    float max[K + 1], sums[kSums * (K + 1)];
    if (lane < parts) {
#pragma unroll
        for (int k = 0; k <= K; ++k) states[k] = load(lane, k);
    }
#pragma unroll
    for (int k = 0; k <= K; ++k) max[k] = states[k].max;
    const float folded = warp_fold(max, lane, -INFINITY, [](float a, float b) { return fmaxf(a, b); });
    float student_drop = 0;
#pragma unroll
    for (int k = 0; k <= K; ++k) {
        // move_student and move_teacher of row_math.h, with the hardware's exponential and without plogp
        const State& state = states[k];
        const bool seen = state.max != -INFINITY;
        const float top = shuffle(folded, k * fold_stride<K + 1>), drop = seen ? state.max - top : 0.0f;
        if (k == 0) student_drop = drop;
        const float factorT = seen ? exp2_fast(drop * scale) : 0.0f;
        const float cross = fmaf(drop - student_drop, state.sumT, state.cross);
        sums[kSums * k + kSumT] = state.sumT * factorT;
        sums[kSums * k + kSum1] = state.sum1 * (seen ? exp2_fast(drop * kLog2E) : 0.0f);
        // A column whose probability underflows to 0 counts 0, even if the student is -inf there and its term infinite
        sums[kSums * k + kCross] = factorT > 0 ? cross * factorT : 0.0f;
    }
    const float sum = warp_fold(sums, lane, 0.0f, [](float a, float b) { return a + b; });
    constexpr int wide = fold_stride<K + 1>, narrow = fold_stride<kSums*(K + 1)>;
    if (lane % wide == 0 && lane / wide <= K) put(lane / wide, 0, folded);
    if (lane % narrow == 0 && lane / narrow < kSums * (K + 1)) {
        const int i = lane / narrow;
        put(i / kSums, 1 + i % kSums, sum);
    }
}

}  // namespace camkd::cuda
