// Element types, exponentials and logarithms on top of one instruction set's Vec. Everything has internal linkage,
// because this header is compiled once per instruction set.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "../row_math.h"
#include "api.h"

namespace camkd::cpu {
namespace {

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

inline Vec load(const float* p) {
    return Vec::load(p);
}
inline Vec load(const bf16* p) {
    return Vec::load_bf16(&p->bits);
}
inline Vec load(const f16* p) {
    return Vec::load_f16(&p->bits);
}
inline void store(float* p, Vec x) {
    x.store(p);
}
inline void store(bf16* p, Vec x) {
    x.store_bf16(&p->bits);
}
inline void store(f16* p, Vec x) {
    x.store_f16(&p->bits);
}

// The first n < width elements; the others are `fill`.
template <class T>
inline Vec load_tail(const T* p, int n, float fill) {
    T buffer[Vec::width];
    store(buffer, Vec::set(fill));
    std::memcpy(buffer, p, n * sizeof(T));
    return load(buffer);
}

template <class T>
inline void store_tail(T* p, Vec x, int n) {
    T buffer[Vec::width];
    store(buffer, x);
    std::memcpy(p, buffer, n * sizeof(T));
}

inline float load_one(const float* p) {
    return *p;
}
inline float load_one(const bf16* p) {
    uint32_t bits = uint32_t(p->bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}
inline float load_one(const f16* p) {
    float buffer[Vec::width];
    load_tail(p, 1, 0.0f).store(buffer);
    return buffer[0];
}

alignas(64) const int32_t kLaneMasks[48] = {0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,
                                            -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                            0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0};

// All bits set in the last (first) `count` lanes, none in the others.
inline Vec last_lanes(int count) {
    return Vec::load(reinterpret_cast<const float*>(kLaneMasks + 16 - Vec::width + count));
}
inline Vec first_lanes(int count) {
    return Vec::load(reinterpret_cast<const float*>(kLaneMasks + 32 - count));
}

// f(0), f(1) ... f(Count - 1), unrolled: each step of a computation runs for all vectors before the next step begins.
template <int Count, class F>
inline void each(F f) {
#pragma GCC unroll 8
    for (int j = 0; j < Count; ++j) f(j);
}

// e^(d * inverseT) for d <= 0: 2^n times a polynomial in the remainder. The relative error is 1.7e-7 near d = 0, where
// it matters most, and grows with the rounding of the exponent, 4e-8 |d| * inverseT. Exactly 1 at d = 0, and 0 below
// 2^-127 (2^-149 with the instruction that scales by powers of two). d = -inf gives 0 and NaN stays NaN.
struct Exp {
    Vec scale, floor;

    explicit Exp(float inverseT) {
        float c = inverseT * 1.44269504f;
        scale = Vec::set(c);
        floor = Vec::set(-127.0f / c);
    }

    // `Count` vectors at once, so that their dependency chains overlap. A template on V, so that the branch whose
    // functions this Vec lacks is not compiled.
    template <int Count, class V>
    void operator()(const V (&d)[Count], V (&out)[Count]) const {
        V t[Count], f[Count];
        if constexpr (V::splits_exponents) {
            each<Count>([&](int j) { t[j] = d[j] * scale; });
            each<Count>([&](int j) { f[j] = V::fraction(t[j]); });
            polynomial(f, out, 1.8671386850e-3f, 9.0170088908e-3f, 5.5799931778e-2f, 2.4016444350e-1f,
                       6.9315131262e-1f);
            each<Count>([&](int j) { out[j] = V::scale_floor(out[j], t[j]); });
        } else {
            // Adding 1.5 * 2^23 + 127 rounds to an integer and leaves n + 127 in the low bits, n's biased exponent.
            const V magic = V::set(12582912.0f + 127.0f);
            V bounded[Count];
            each<Count>([&](int j) { bounded[j] = V::max(floor, d[j]); });
            each<Count>([&](int j) { t[j] = V::fma(bounded[j], scale, magic); });
            each<Count>([&](int j) { f[j] = V::fma(bounded[j], scale, magic - t[j]); });
            polynomial(f, out, 1.326472824e-3f, 9.671512637e-3f, 5.550733740e-2f, 2.402224209e-1f, 6.931469776e-1f);
            each<Count>([&](int j) { out[j] = out[j] * V::exponent(t[j]); });
        }
    }
    Vec operator()(Vec d) const {
        const Vec in[1] = {d};
        Vec out[1];
        (*this)(in, out);
        return out[0];
    }

  private:
    // Minimax relative error for 2^f on [0, 1) or [-1/2, 1/2] with the constant term fixed at 1, by linear programming.
    template <int Count>
    static void polynomial(const Vec (&f)[Count], Vec (&p)[Count], float c5, float c4, float c3, float c2, float c1) {
        each<Count>([&](int j) { p[j] = Vec::fma(Vec::set(c5), f[j], Vec::set(c4)); });
        for (float c : {c3, c2, c1, 1.0f}) each<Count>([&](int j) { p[j] = Vec::fma(p[j], f[j], Vec::set(c)); });
    }
};

// The `Math` policy of row_math.h for a Vec that holds one row per lane.
struct LaneMath {
    static Vec set(float x) { return Vec::set(x); }
    static Vec max(Vec a, Vec b) { return Vec::max(a, b); }
    static Vec difference(Vec a, Vec b) { return Vec::difference(a, b); }
    static Vec zero_where_zero(Vec x, Vec where) { return Vec::zero_where_zero(x, where); }
    static Vec where_positive(Vec x, Vec a, Vec b) { return Vec::where_positive(x, a, b); }
    static Vec exp(Vec x) { return Exp(1.0f)(x); }

    // ln(m 2^e) = 2 atanh(s) + e ln 2 with s = (m - 1) / (m + 1), m in [sqrt(1/2), sqrt(2)).
    static Vec log(Vec x) {
        const Vec one = Vec::set(1.0f);
        Vec m, e;
        x.split(m, e);
        const Vec s = (m - one) / (m + one), q = s * s, twice = s + s;
        Vec tail = Vec::fma(q, Vec::set(0.11111111f), Vec::set(0.14285714f));
        tail = Vec::fma(q, tail, Vec::set(0.2f));
        tail = q * Vec::fma(q, tail, Vec::set(0.33333333f));
        // ln 2 as the sum of two floats
        const Vec low = Vec::fma(e, Vec::set(-1.9046543e-9f), twice * tail);
        const Vec result = Vec::fma(e, Vec::set(0.693147182f), twice + low);
        return x.all_between(FLT_MIN, INFINITY) ? result : extremes(x, result);
    }

  private:
    // Sums of exponentials are at least 1; they are 0, inf or NaN only where logits are infinite or NaN. Such a lane
    // must not change the bits of its neighbours.
    static Vec extremes(Vec x, Vec result) {
        float argument[Vec::width], value[Vec::width];
        x.store(argument);
        result.store(value);
        for (int i = 0; i < Vec::width; ++i)
            if (!(argument[i] > FLT_MIN && argument[i] < INFINITY)) value[i] = std::log(argument[i]);
        return Vec::load(value);
    }
};

// Stores the first n lanes to p[0 .. n).
inline void store_lanes(float* p, Vec x, int n) {
    if (n == Vec::width)
        x.store(p);
    else
        store_tail(p, x, n);
}

template <class T>
inline const T* row_start(const Matrix& matrix, int64_t S, int64_t row) {
    int64_t outer = row / S;
    return static_cast<const T*>(matrix.data) + outer * matrix.stride_outer + (row - outer * S) * matrix.stride_inner;
}

constexpr int64_t kStreamingBytes = 4 * 1024 * 1024;  // a larger gradient does not stay in the cache anyway
constexpr int64_t kWorkPerThread = 32 * 1024;         // fewer elements do not repay waking a thread

inline int useful_threads(int64_t elements, int threads) {
    return int(std::clamp<int64_t>(elements / kWorkPerThread, 1, std::max(threads, 1)));
}

// Calls f(T{}) with the element type that `dtype` names.
template <class F>
inline auto with_dtype(DType dtype, F f) {
    switch (dtype) {
        case DType::bf16:
            return f(bf16{});
        case DType::f16:
            return f(f16{});
        default:
            return f(float{});
    }
}

}  // namespace
}  // namespace camkd::cpu
