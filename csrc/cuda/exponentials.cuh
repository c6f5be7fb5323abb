// Exponentials of logits relative to a maximum, at temperature T and at 1, for row_loss/ and confidence.cuh.
#pragma once

#include "elements.cuh"

namespace camkd::cuda {

constexpr float kLog2E = 1.4426950408889634f;

// The maximum to subtract. With no finite logit any number will do, as every exponential is 0.
CAMKD_DEVICE float finite(float max) {
    return max == -INFINITY ? 0.0f : max;
}

// The reference of a stream for exponentials at the cost of one multiply-add each: 2^{x scale - at}, with `at` the
// rounded max * scale. The rounding error `rest` is the same for all columns and is corrected in their sums, so that a
// large common offset of a row costs no accuracy.
struct Reference {
    float at, rest;

    CAMKD_DEVICE Reference() {}
    CAMKD_DEVICE Reference(float max, float scale) {
        max = finite(max);
        at = max * scale;
        rest = fmaf(max, scale, -at);
    }
    // `exact`: as far() below, whatever the maximum.
    CAMKD_DEVICE Reference(float max, float scale, bool exact) : Reference(max, scale) {
        if (exact) rest = INFINITY;
    }
    // True if `rest` is too large for a correction, or max * scale overflows, as in a row of the lowest float. The
    // distances from the maximum are then computed before they are scaled.
    CAMKD_DEVICE bool far() const { return !(fabsf(rest) <= 0x1p-9f); }
    // Replaces x by its scaled distance from the maximum, up to `rest` unless far().
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
    // What apply() and the hardware's exponential make of the maximum: nearly 1.
    CAMKD_DEVICE float of_max(float max, float scale) const { return far() ? 1.0f : exp2_fast(fmaf(max, scale, -at)); }
    CAMKD_DEVICE float correction() const { return far() ? 0.0f : rest; }
    // 2^-correction(), by which sums of exponentials must be multiplied. The hardware's exponential has an error of 2
    // ulp, this series has not.
    CAMKD_DEVICE float factor() const {
        const float y = correction() * 0.693147181f;
        return 1.0f - (y - 0.5f * y * y);
    }
};

// `power`: T if it is 1, 2 or 4, and e^x the product of as many e^{x/T}. 0 for any other T, at the cost of a second
// exponential.
struct Temperature {
    float scale, inverse;  // log2(e) / T and its inverse
    int power;

    // e^x from e = e^{x/T}, for powers other than 0.
    CAMKD_DEVICE float raise(float e) const {
        if (power >= 2) e *= e;
        return power == 4 ? e * e : e;
    }
    // factor() for the exponentials at T = 1.
    CAMKD_DEVICE float factor1(const Reference& reference, float max, bool exact = false) const {
        return power ? raise(reference.factor()) : Reference(max, kLog2E, exact).factor();
    }
    // of_max() at T = 1, from that at T.
    CAMKD_DEVICE float of_max1(float of_max, float max, bool exact) const {
        return power ? raise(of_max) : Reference(max, kLog2E, exact).of_max(max, kLog2E);
    }
    // sum_c e^{x_c - r} from the sum1 of a row of which r is a logit, and the factor of the reference r. The term of r
    // is 1: it is taken out as it was added (add_raised), with the errors of the hardware's exponential and of its
    // power, beside which the other terms of a nearly certain row would not be seen.
    CAMKD_DEVICE float mass(float r, float factor, float sum1) const {
        float own = exp2_fast(fmaf(r, scale, -(r * scale)));
        if (power == 4) own *= own;
        const float others = power == 1 ? sum1 - own : fmaf(-own, own, sum1);
        return fmaf(others, raise(factor), 1.0f);
    }
};

inline Temperature temperature_of(float T) {
    return {float(1.4426950408889634 / T), float(T / 1.4426950408889634), temperature_power(T)};
}

template <int V>
CAMKD_DEVICE void exps(const float (&u)[V], float (&e)[V]) {
#pragma unroll
    for (int j = 0; j < V; ++j) e[j] = exp2_fast(u[j]);
}

}  // namespace camkd::cuda
