// The sums of a row in a warp that has all of it: each lane holds one of them (warp_fold) and shares it with the
// others, together with the numbers that it can compute from it at once.
#pragma once

#include "fixed_k_passes.cuh"

namespace camkd::cuda {

// `mass` is e^CE for sums at T = 1, up to the rounding that Temperature::mass is without; `probability` that of the
// label for sums at T.
struct alignas(Pack) SharedSum {
    float sum, mass, inverse, probability;

    SharedSum() = default;
    // The label's own exponential is not 1 but 1 / factor; sum1 relative to it is e^CE.
    CAMKD_DEVICE SharedSum(float x, const Reference& reference, const Temperature& temperature) {
        const float factor = reference.factor();
        sum = x;
        mass = sum * temperature.raise(factor);
        inverse = reciprocal(sum);
        probability = inverse * reciprocal(factor);
    }
};

// All of a row, in registers.
template <int K>
struct SharedSums {
    SharedSum sumT[K + 1], sum1[K + 1];
    float total, total_cross;  // of all sums but the |cross|, and of these

    // By value: whole structs are read 16 bytes at a time.
    CAMKD_DEVICE SharedSums(const SharedSum* shared) {
#pragma unroll
        for (int k = 0; k <= K; ++k) {
            sumT[k] = shared[label_sum(k, kSumT)];
            sum1[k] = shared[label_sum(k, kSum1)];
            const float both = sumT[k].sum + sum1[k].sum;
            const float cross = k > 0 ? fabsf(shared[label_sum(k, kCross)].sum) : 0.0f;
            total = k == 0 ? both : total + both;
            total_cross = k <= 1 ? cross : total_cross + cross;
        }
    }
};

// Which sum a lane holds, and which row of row_stats it computes.
template <int K>
struct LaneRole {
    static constexpr int count = kLabelSums<K>, stride = fold_stride<count>;
    static constexpr int loss_lane = stride > 1 ? 1 : count;  // a lane that shares no sum
    static constexpr int none = 64;                           // instead of a row
    uint32_t bits;

    CAMKD_DEVICE LaneRole(int lane) {
        const int sum = lane / stride < count ? lane / stride : count - 1;
        const int stream = sum < kCross ? 0 : (sum + 1) / kSums, which = sum < kCross ? sum : (sum + 1) % kSums;
        int row = stream == 0      ? (which == kSumT ? row_stats::soft : row_stats::hard)
                  : which == kSumT ? row_stats::divergence(stream - 1)
                  : which == kSum1 ? row_stats::teacher_ce(K, stream - 1)
                                   : row_stats::weight(K, stream - 1);
        // Several lanes hold the same sum
        if (lane % stride != 0 || lane / stride >= count) row = none;
        if (lane == loss_lane) row = row_stats::loss;
        bits = uint32_t(row << 24 | sum << 16 | which << 8 | stream);
    }

    // Stops the compiler from keeping each of the numbers below in a register of its own.
    CAMKD_DEVICE void keep() { keep_in_register(bits); }

    // The sum is kSumT, kSum1 or kCross of a stream, and number sum() of all.
    CAMKD_DEVICE int stream() const { return bits & 0xff; }
    CAMKD_DEVICE int which() const { return bits >> 8 & 0xff; }
    CAMKD_DEVICE int sum() const { return bits >> 16 & 0xff; }
    CAMKD_DEVICE int row() const { return bits >> 24; }
    CAMKD_DEVICE bool is_divergence() const { return which() == kSumT && stream() > 0; }
    CAMKD_DEVICE bool shares() const { return row() != none && row() != row_stats::loss; }
    CAMKD_DEVICE bool writes() const { return row() != none; }
    CAMKD_DEVICE bool adds_up() const { return row() < row_stats::per_teacher; }

    // The lane of a sum.
    static CAMKD_DEVICE constexpr int lane_of(int stream, int which) { return label_sum(stream, which) * stride; }
};

}  // namespace camkd::cuda
