// The fast path: one thread's passes with the number of teachers and the power as compile-time constants, and with the
// logit at the label as the reference of every stream. The label's own term of each sum is then 1, so no maximum is
// needed first, the sums of parts of a row merge by addition, and those at T = 1 are e^CE. All of a thread's data is in
// registers, and within a row there are branches only for rare cases. RowResults::compute_label_weights decides which
// rows need the general passes instead; in WarpRows::run_fast the row itself does, by RowResults::in_range.
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

// The sums of a row: kSumT and kSum1 of the student, then all three of each teacher. They are like those of
// StreamState, with the scaled logit at the label (Reference::at) in place of the maximum; `cross` stays scaled too.
enum Sum { kSumT, kSum1, kCross, kSums };
template <int K>
constexpr int kLabelSums = kSums * (K + 1) - 1;
CAMKD_HD int label_sum(int stream, int which) {
    return stream == 0 ? which : kSums * stream - 1 + which;
}

// Smallest power of two >= N.
template <int N>
constexpr int power_of_two = 2 * power_of_two<(N + 1) / 2>;
template <>
constexpr int power_of_two<1> = 1;

// Adds each of N numbers across the warp; the sum of number i is in lane i * fold_stride<N>. Each exchange halves the
// numbers that are left, while N separate reductions would exchange all of them five times.
template <int N>
constexpr int fold_stride = kWarp / power_of_two<N>;

// Lanes with `bit` keep the numbers from n on and the others those before n, until one is left.
template <int N, int n, int bit, int M>
CAMKD_DEVICE void fold_halves(float (&y)[M], int lane) {
    if constexpr (n >= 1) {
        const bool upper = lane & bit;
#pragma unroll
        for (int i = 0; i < n && i < N; ++i) {
            if (i + n < N) {
                // By value: a select between elements would put the array in local memory
                const float a = y[i], b = y[i + n < M ? i + n : 0];
                y[i] = (upper ? b : a) + shuffle_xor(upper ? a : b, bit);
            } else {
                y[i] += shuffle_xor(y[i], bit);
            }
        }
        fold_halves<(N < n ? N : n), n / 2, bit / 2>(y, lane);
    } else if constexpr (bit >= 1) {
        y[0] += shuffle_xor(y[0], bit);
        fold_halves<1, 0, bit / 2>(y, lane);
    }
}

template <int N>
CAMKD_DEVICE float warp_fold(float (&x)[N], int lane) {
    fold_halves<N, power_of_two<N> / 2, kWarp / 2>(x, lane);
    return x[0];
}

// The references of a row, from its logits at the label.
template <int K>
CAMKD_DEVICE void label_references(const float* logits, float scale, float (&at)[K + 1]) {
#pragma unroll
    for (int k = 0; k <= K; ++k) at[k] = logits[k] * scale;
}

// sum + e^P; the last multiplication is fused with the addition. For P = 1 the sum is that of e, and is copied later.
template <int P>
CAMKD_DEVICE float add_raised(float sum, float e) {
    if (P == 1) return sum;
    if (P == 4) e *= e;
    return fmaf(e, e, sum);
}

// Adds the terms of `cross` in the marked slots. Probability 0 contributes 0, even where the difference is infinite.
template <class T, int K>
CAMKD_DEVICE void add_masked_cross(const RowBuffer& buffer, const Chunk& chunk, uint32_t marked, float scale,
                                   const float (&at)[K + 1], float (&sums)[kLabelSums<K>]) {
#pragma unroll 1
    for (int i = 0; i < chunk.held; ++i) {
        if ((marked >> i & 1) == 0) continue;
#pragma unroll 1
        for (int j = 0; j < kVector<T>; ++j) {
            const float s = fmaf(element_of<T>(*buffer.slot(0, chunk.begin + i), j), scale, -at[0]);
#pragma unroll
            for (int k = 1; k <= K; ++k) {
                const float z = fmaf(element_of<T>(*buffer.slot(k, chunk.begin + i), j), scale, -at[k]);
                const float e = exp2_fast(z);
                float& cross = sums[label_sum(k, kCross)];
                if (e > 0) cross = fmaf(e, z - s, cross);
            }
        }
    }
}

// Adds the terms of this thread's vectors of a chunk.
template <class T, int K, int P>
CAMKD_DEVICE void add_vectors(const RowBuffer& buffer, const Chunk& chunk, float scale, const float (&at)[K + 1],
                              float (&sums)[kLabelSums<K>]) {
    constexpr int V = kVector<T>;
    static_assert(kMaxSlots <= 32, "a bit per slot");
    uint32_t marked = 0;  // slots with -inf in student and teacher, outside the row too: (-inf) - (-inf) is NaN
    const Pack* slot = buffer.slot(0, chunk.begin);
#pragma unroll 1
    for (int i = 0; i < chunk.held; ++i, slot += buffer.slot_stride()) {
        float s[V], cross[K], check = 0;
        Elements<T>::unpack(slot[0], s);
        Reference::scale_from(at[0], scale, s);
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const float e = exp2_fast(s[j]);
            sums[kSumT] += e;
            sums[kSum1] = add_raised<P>(sums[kSum1], e);
        }
#pragma unroll
        for (int k = 1; k <= K; ++k) {
            float z[V];
            Elements<T>::unpack(slot[k * kWarp], z);
            Reference::scale_from(at[k], scale, z);
#pragma unroll
            for (int j = 0; j < V; ++j) {
                const float e = exp2_fast(z[j]), distance = z[j] - s[j];
                float &sumT = sums[label_sum(k, kSumT)], &sum1 = sums[label_sum(k, kSum1)];
                sumT += e;
                sum1 = add_raised<P>(sum1, e);
                cross[k - 1] = j == 0 ? e * distance : fmaf(e, distance, cross[k - 1]);
            }
            check = k == 1 ? cross[0] : check + cross[k - 1];
        }
        if (check == check) {
#pragma unroll
            for (int k = 1; k <= K; ++k) sums[label_sum(k, kCross)] += cross[k - 1];
        } else {
            marked |= 1u << i;
        }
    }
    if (marked) add_masked_cross<T, K>(buffer, chunk, marked, scale, at, sums);
}

// The references and coefficients of a row in registers.
template <int K>
struct FixedKRow {
    float at[K + 1], studentT, student1, teacher[K];

    // By value: whole structs are read 16 bytes at a time.
    template <class Logits, class Coefficients>
    CAMKD_DEVICE FixedKRow(Logits logits, float scale, Coefficients coefficients) {
        label_references<K>(logits.at, scale, at);
        studentT = coefficients.studentT;
        student1 = coefficients.student1;
#pragma unroll
        for (int k = 0; k < K; ++k) teacher[k] = coefficients.teacher[k];
    }
};

// Reads the vectors of a slot.
template <int K>
CAMKD_DEVICE void read_slot(const Pack* slot, Pack (&packs)[K + 1]) {
#pragma unroll
    for (int k = 0; k <= K; ++k) packs[k] = slot[k * kWarp];
}

// A vector of the gradient, but for the label's column.
template <class T, int K, int P>
CAMKD_DEVICE void fixed_k_grad_vector(const Pack (&packs)[K + 1], float scale, const FixedKRow<K>& row,
                                      float (&out)[kVector<T>]) {
    constexpr int V = kVector<T>;
    float x[V];
    Elements<T>::unpack(packs[0], x);
    Reference::scale_from(row.at[0], scale, x);
#pragma unroll
    for (int j = 0; j < V; ++j) {
        const float e = exp2_fast(x[j]);
        // studentT e + student1 e^P
        if (P == 1) out[j] = (row.studentT + row.student1) * e;
        if (P == 2) out[j] = fmaf(row.student1, e, row.studentT) * e;
        if (P == 4) {
            const float q = e * e;
            out[j] = fmaf(row.student1 * q, q, row.studentT * e);
        }
    }
#pragma unroll
    for (int k = 1; k <= K; ++k) {
        Elements<T>::unpack(packs[k], x);
        Reference::scale_from(row.at[k], scale, x);
#pragma unroll
        for (int j = 0; j < V; ++j) out[j] = fmaf(-row.teacher[k - 1], exp2_fast(x[j]), out[j]);
    }
}

// Writes the gradient of `count` slots of whole vectors: those in `slot` and after it, in steps of a warp from `to` on.
// With `more`, copies the vectors at `from` into the slots.
template <class T, int K, int P, bool more>
CAMKD_DEVICE void write_fixed_k_slots(const FixedKRow<K>& row, float scale, Pack* slot, int count,
                                      const char* (&from)[K + 1], char* to) {
    constexpr int unrolled = 4, vector_stride = kWarp * int(sizeof(Pack)), slot_stride = (K + 1) * kWarp;
#pragma unroll
    for (int k = 0; k <= K; ++k) keep_in_register(from[k]);
    keep_in_register(to);
#pragma unroll 1
    for (int i = 0; i < count; i += unrolled) {
#pragma unroll
        for (int u = 0; u < unrolled; ++u) {
            if (u > 0 && i + u >= count) break;
            Pack packs[K + 1];
            float x[kVector<T>];
            read_slot<K>(slot + u * slot_stride, packs);
            if (more) {
#pragma unroll
                for (int k = 0; k <= K; ++k)
                    copy_async(slot + u * slot_stride + k * kWarp, from[k] + u * vector_stride);
            }
            fixed_k_grad_vector<T, K, P>(packs, scale, row, x);
            store_pack(to + u * vector_stride, Elements<T>::pack(x));
        }
        slot += unrolled * slot_stride;
        to += unrolled * vector_stride;
#pragma unroll
        for (int k = 0; k <= K; ++k) from[k] += unrolled * vector_stride;
    }
}

}  // namespace camkd::cuda
