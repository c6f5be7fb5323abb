// Four floats in the compiler's portable vector type: SSE2 on x86-64, NEON on 64-bit Arm.
#pragma once

#include <cstdint>
#include <cstring>

namespace camkd::cpu {
namespace {

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));

struct Vec {
    static constexpr int width = 4;
    static constexpr int unroll = 2;  // independent vectors per step that fit the registers
    static constexpr const char* name = "baseline";
    static constexpr bool splits_exponents = false;
    Floats v;

    static Vec set(float x) { return {Floats{x, x, x, x}}; }
    static Vec zero() { return set(0.0f); }
    static Vec load(const float* p) {
        Vec out;
        std::memcpy(&out.v, p, sizeof(out.v));
        return out;
    }
    void store(float* p) const { std::memcpy(p, &v, sizeof(v)); }
    void stream(float* p) const { store(p); }

    static Vec load_bf16(const uint16_t* p) { return {(Floats)(widen(p) << 16)}; }
    static Vec load_f16(const uint16_t* p) {
        Bits half = widen(p);
        Bits magnitude = half & 0x7fffu;
        // Rebiasing the exponent is a multiplication by 2^112, exact for subnormals too; inf and NaN need all ones.
        Floats scaled = (Floats)(magnitude << 13) * set(0x1p112f).v;
        Bits special = (Bits)((Ints)magnitude >= (Ints)splat(0x7c00)) & 0x7f800000u;
        return {(Floats)((Bits)scaled | special | ((half & 0x8000u) << 16))};
    }
    // Round to nearest even; NaN stays NaN (quiet).
    void store_bf16(uint16_t* p) const {
        Bits bits = (Bits)v;
        Bits rounded = bits + ((bits >> 16) & 1u) + 0x7fffu;
        Bits nan = (Bits)(v != v);
        narrow(((rounded & ~nan) | (splat(0x7fc00000u) & nan)) >> 16, p);
    }
    void store_f16(uint16_t* p) const {
        Bits sign = ((Bits)v >> 16) & 0x8000u;
        Bits magnitude = (Bits)v & 0x7fffffffu;
        // Normal range: rebias, then round to nearest even on the 13 bits that are dropped.
        Bits normal = (magnitude - splat(112u << 23) + ((magnitude >> 13) & 1u) + 0xfffu) >> 13;
        // Below 2^-14 adding 0.5 leaves the float's own rounding with ulps of 2^-24, a half's subnormal step.
        Bits subnormal = (Bits)((Floats)magnitude + set(0.5f).v) - (Bits)set(0.5f).v;
        Bits small = (Bits)((Ints)magnitude < (Ints)splat(113u << 23));
        Bits large = (Bits)((Ints)magnitude >= (Ints)splat(0x477ff000u));  // rounds to 65536 and above
        Bits nan = (Bits)(v != v);
        Bits out = (subnormal & small) | (normal & ~small);
        out = (out & ~large) | (splat(0x7c00u) & large);
        narrow(out | (splat(0x0200u) & nan) | sign, p);
    }

    friend Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
    friend Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
    friend Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
    friend Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
    static Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
    static Vec fnma(Vec a, Vec b, Vec c) { return {c.v - a.v * b.v}; }  // c - a * b
    // The second operand where one is NaN.
    static Vec max(Vec a, Vec b) {
        Bits greater = (Bits)(a.v > b.v);
        return {(Floats)(((Bits)a.v & greater) | ((Bits)b.v & ~greater))};
    }
    static Vec bit_and(Vec x, Vec mask) { return {(Floats)((Bits)x.v & (Bits)mask.v)}; }
    static Vec zero_where_zero(Vec x, Vec where) { return {(Floats)((Bits)x.v & (Bits)(where.v != zero().v))}; }
    static Vec difference(Vec a, Vec b) {  // a - b; 0 where they are equal, infinities included
        return {(Floats)((Bits)(a.v - b.v) & (Bits)(a.v != b.v))};
    }
    static Vec where_positive(Vec x, Vec a, Vec b) {  // a where x > 0 or NaN
        Bits at_most = (Bits)(x.v <= zero().v);
        return {(Floats)(((Bits)b.v & at_most) | ((Bits)a.v & ~at_most))};
    }
    bool all_between(float low, float high) const {
        Ints inside = (v > set(low).v) & (v < set(high).v);
        return (inside[0] & inside[1] & inside[2] & inside[3]) != 0;
    }
    // The low nine bits of x's pattern as a biased exponent: 2^(bits - 127), and 0 for bits = 0.
    static Vec exponent(Vec x) { return {(Floats)((Bits)x.v << 23)}; }

    // x = mantissa * 2^exponent with the mantissa in [sqrt(1/2), sqrt(2)), for positive normal x.
    void split(Vec& mantissa, Vec& exponent) const {
        Ints e = ((Ints)v - (Ints)splat(0x3f3504f3)) >> 23;
        mantissa.v = (Floats)((Ints)v - (e << 23));
        exponent.v = Floats{float(e[0]), float(e[1]), float(e[2]), float(e[3])};
    }

    float sum() const { return (v[0] + v[2]) + (v[1] + v[3]); }
    float max() const {
        float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
        return a > b ? a : b;
    }
    static void sum_each(Vec a, Vec b, Vec c, Vec d, float* out) {
        out[0] = a.sum();
        out[1] = b.sum();
        out[2] = c.sum();
        out[3] = d.sum();
    }

  private:
    static Bits splat(uint32_t x) { return Bits{x, x, x, x}; }
    static Bits widen(const uint16_t* p) { return Bits{p[0], p[1], p[2], p[3]}; }
    static void narrow(Bits x, uint16_t* p) {
        for (int i = 0; i < width; ++i) p[i] = uint16_t(x[i]);
    }
};

}  // namespace
}  // namespace camkd::cpu
