// Sixteen floats in an AVX-512 register (F, BW, DQ, VL).
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace camkd::cpu {
namespace {

struct Vec {
    static constexpr int width = 16;
    static constexpr int unroll = 4;  // independent vectors per step that fit the registers
    static constexpr const char* name = "avx512";
    __m512 v;

    static Vec set(float x) { return {_mm512_set1_ps(x)}; }
    static Vec zero() { return {_mm512_setzero_ps()}; }
    static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
    void stream(float* p) const { _mm512_stream_ps(p, v); }  // p aligned to 64 bytes

    static Vec load_bf16(const uint16_t* p) {
        // One permutation puts each half word above a zero one.
        const __m512i high_halves =
            _mm512_slli_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 16);
        __m512i narrow = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        return {_mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, high_halves, narrow))};
    }
    static Vec load_f16(const uint16_t* p) {
        return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
    }
    // Round to nearest even: numbers get half a unit added, and one bit more where the kept part is odd.
    void store_bf16(uint16_t* p) const {
        const __m512i high_halves = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 31, 29, 27, 25, 23,
                                                     21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
        __m512i bits = _mm512_castps_si512(v);
        const __mmask16 number = _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q);
        const __mmask16 odd = _mm512_mask_test_epi32_mask(number, bits, _mm512_set1_epi32(0x10000));
        bits = _mm512_mask_add_epi32(bits, number, bits, _mm512_set1_epi32(0x7fff));
        bits = _mm512_mask_add_epi32(bits, odd, bits, _mm512_set1_epi32(1));
        __m512i narrow = _mm512_permutexvar_epi16(high_halves, bits);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(narrow));
    }
    void store_f16(uint16_t* p) const {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }

    friend Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
    friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
    friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
    friend Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
    static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
    static Vec fnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a * b
    // The second operand where one is NaN.
    static Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
    static Vec bit_and(Vec x, Vec mask) { return {_mm512_and_ps(x.v, mask.v)}; }
    static Vec zero_where_zero(Vec x, Vec where) {
        return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(where.v, _mm512_setzero_ps(), _CMP_NEQ_UQ), x.v)};
    }
    static Vec difference(Vec a, Vec b) {  // a - b; 0 where they are equal, infinities included
        return {_mm512_maskz_sub_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_NEQ_UQ), a.v, b.v)};
    }
    static Vec where_positive(Vec x, Vec a, Vec b) {  // a where x > 0 or NaN
        return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_NLE_UQ), b.v, a.v)};
    }
    bool all_between(float low, float high) const {
        return (_mm512_cmp_ps_mask(v, _mm512_set1_ps(low), _CMP_GT_OQ) &
                _mm512_cmp_ps_mask(v, _mm512_set1_ps(high), _CMP_LT_OQ)) == 0xffff;
    }
    // 2^t in two instructions and a polynomial: t - floor(t), 0 for -inf, and p * 2^floor(t), 0 for -inf.
    static constexpr bool splits_exponents = true;
    static Vec fraction(Vec t) { return {_mm512_reduce_ps(t.v, _MM_FROUND_TO_NEG_INF)}; }
    static Vec scale_floor(Vec p, Vec t) { return {_mm512_scalef_ps(p.v, t.v)}; }

    // x = mantissa * 2^exponent with the mantissa in [sqrt(1/2), sqrt(2)), for positive normal x.
    void split(Vec& mantissa, Vec& exponent) const {
        __m512i bits = _mm512_castps_si512(v);
        __m512i e = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(0x3f3504f3)), 23);
        mantissa.v = _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(e, 23)));
        exponent.v = _mm512_cvtepi32_ps(e);
    }

    float sum() const { return _mm512_reduce_add_ps(v); }
    float max() const { return _mm512_reduce_max_ps(v); }
    // The sums of four vectors, each added in the order of sum(), at about the cost of two.
    static void sum_each(Vec a, Vec b, Vec c, Vec d, float* out) {
        auto quarter = [](Vec x) {
            __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
            return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
        };
        auto pairs = [](__m128 x, __m128 y) { return _mm_add_ps(_mm_movelh_ps(x, y), _mm_movehl_ps(y, x)); };
        const __m128 ab = pairs(quarter(a), quarter(b)), cd = pairs(quarter(c), quarter(d));
        _mm_storeu_ps(out, _mm_add_ps(_mm_shuffle_ps(ab, cd, 0x88), _mm_shuffle_ps(ab, cd, 0xdd)));
    }
};

}  // namespace
}  // namespace camkd::cpu
