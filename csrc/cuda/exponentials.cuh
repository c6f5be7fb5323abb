// Exponentials of logits relative to a maximum, at temperature T and at 1.
#pragma once

#include "elements.cuh"

namespace camkd::cuda {

constexpr float kLog2E = 1.4426950408889634f;

// A maximum to subtract: where no finite logit was seen any will do, every exponential is 0.
CAMKD_DEVICE float finite(float max) {
    return max == -INFINITY ? 0.0f : max;
}

// Exponentials relative to a maximum in one multiply-add each: 2^{x scale - at}, where `at` is max * scale rounded.
// What the rounding lost, `rest`, is the same for all columns and is put right in their sums: so a large common offset
// of a row costs no accuracy.
struct Reference {
    float at, rest;

    CAMKD_DEVICE Reference() {}
    CAMKD_DEVICE Reference(float max, float scale) {
        max = finite(max);
        at = max * scale;
        rest = fmaf(max, scale, -at);
    }
    // `exact`: distances that are formed before they are scaled, whatever the maximum.
    CAMKD_DEVICE Reference(float max, float scale, bool exact) : Reference(max, scale) {
        if (exact) rest = INFINITY;
    }
    // So large a maximum that `rest` is no correction any more, or the product overflows, as for a row of the lowest
    // float: its distances are formed before they are scaled.
    CAMKD_DEVICE bool far() const { return !(fabsf(rest) <= 0x1p-9f); }
    // x becomes its scaled distance from the maximum, but for a `rest` that is not far.
    template <int V>
    CAMKD_DEVICE void apply(float scale, const float& max, float (&x)[V]) const {
        if (far())
            scale_far(max, scale, x);
        else
            scale_from(at, scale, x);
    }
    template <int V>
    static CAMKD_DEVICE void scale_from(float at, float scale, float (&x)[V]) {
#pragma unroll
        for (int j = 0; j < V; ++j) x[j] = fmaf(x[j], scale, -at);
    }
    template <int V>
    static CAMKD_DEVICE void scale_far(float max, float scale, float (&x)[V]) {
#pragma unroll
        for (int j = 0; j < V; ++j) x[j] = (x[j] - finite(max)) * scale;
    }
    CAMKD_DEVICE float correction() const { return far() ? 0.0f : rest; }
    // 2^-left, the factor that sums of exponentials lack; the hardware's exponential would err by 2 ulp.
    CAMKD_DEVICE float factor() const {
        const float y = correction() * 0.693147181f;
        return 1.0f - (y - 0.5f * y * y);
    }
};

// T = 1, 2 and 4 (`power`): e^x is a product of e^{x/T}. Otherwise (0) it takes an exponential of its own.
struct Temperature {
    float scale, inverse;  // log2(e) / T and its inverse
    int power;

    // `to_one` of an e^{x/T}, for powers other than 0.
    CAMKD_DEVICE float raise(float e) const {
        if (power >= 2) e *= e;
        return power == 4 ? e * e : e;
    }
    // factor() of the exponentials at T = 1.
    CAMKD_DEVICE float factor1(const Reference& reference, float max, bool exact = false) const {
        return power ? raise(reference.factor()) : Reference(max, kLog2E, exact).factor();
    }
};

template <int V>
CAMKD_DEVICE void exps(const float (&u)[V], float (&e)[V]) {
#pragma unroll
    for (int j = 0; j < V; ++j) e[j] = exp2_fast(u[j]);
}

}  // namespace camkd::cuda
