// Logits from what a head computes (LogitMap): a block of columns at a time, into float memory that the passes of
// row_blocks.h then read. Rare enough that it is a pass of its own rather than a variant of every other one.
#pragma once

#include "vec_math.h"

namespace camkd::cpu {
namespace {

struct Tanh {
    Vec value, slope;  // tanh(x) and 1 - tanh(x)^2
};

// Both with a relative error of 3e-7: near 0, where 1 - 2 / (e^{2x} + 1) would cancel, and far away, where 1 - tanh^2
// would.
inline Tanh tanh(Vec x) {
    const Vec zero = Vec::zero(), one = Vec::set(1.0f), magnitude = Vec::max(zero - x, x);
    const Vec t = Exp(2.0f)(zero - magnitude), inverse = one / (one + t);
    // x + x^3 p(x^2) up to 0.625, with the coefficients of tanhf in the Cephes library
    const Vec square = x * x;
    Vec p = Vec::fma(square, Vec::set(-5.70498872745e-3f), Vec::set(2.06390887954e-2f));
    for (float c : {-5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f}) p = Vec::fma(p, square, Vec::set(c));
    const Vec small = Vec::fma(magnitude * square, p, magnitude);
    const Vec is_large = magnitude - Vec::set(0.625f);
    const Vec positive = Vec::where_positive(is_large, (one - t) * inverse, small);
    const Vec slope =
        Vec::where_positive(is_large, Vec::set(4.0f) * t * inverse * inverse, Vec::fnma(small, small, one));
    return {Vec::where_positive(x, positive, zero - positive), slope};
}

struct VecMap {
    Vec scale, softcap;
    bool capped;

    explicit VecMap(const LogitMap& map)
        : scale(Vec::set(map.softcap == 0 ? map.scale : map.scale / map.softcap)),
          softcap(Vec::set(map.softcap)),
          capped(map.softcap != 0) {}
    Vec operator()(Vec x) const { return capped ? softcap * tanh(scale * x).value : scale * x; }
    float of(float x) const {
        float lanes[Vec::width];
        (*this)(Vec::set(x)).store(lanes);
        return lanes[0];
    }
};

// out = logits of x, n columns.
template <class T>
void map_block(const T* x, int n, const LogitMap& map, float* out) {
    constexpr int W = Vec::width;
    const VecMap logits(map);
    int i = 0;
    for (; i + W <= n; i += W) logits(load(x + i)).store(out + i);
    if (i < n) store_lanes(out + i, logits(load_tail(x + i, n - i, 0.0f)), n - i);
}

// out = gradient * d logit / dx, n columns; `out` may be `x`.
template <class T>
void map_gradient_block(const T* x, const float* gradient, int n, const LogitMap& map, T* out) {
    constexpr int W = Vec::width;
    const VecMap logits(map);
    const Vec one = Vec::set(1.0f), scale = Vec::set(map.scale);
    auto of = [&](Vec value, Vec from) {
        return scale * value * (logits.capped ? tanh(logits.scale * from).slope : one);
    };
    int i = 0;
    for (; i + W <= n; i += W) store(out + i, of(Vec::load(gradient + i), load(x + i)));
    if (i == n) return;
    store_tail(out + i, of(load_tail(gradient + i, n - i, 0.0f), load_tail(x + i, n - i, 0.0f)), n - i);
}

}  // namespace
}  // namespace camkd::cpu
