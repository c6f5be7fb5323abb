// Eight floats in an AVX2 register (with FMA and F16C).
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace camkd::cpu {
namespace {

struct Vec {
    static constexpr int width = 8;
    static constexpr int unroll = 2;  // independent vectors per step that fit the registers
    static constexpr const char* name = "avx2";
    static constexpr bool splits_exponents = false;
    __m256 v;

    static Vec set(float x) { return {_mm256_set1_ps(x)}; }
    static Vec zero() { return {_mm256_setzero_ps()}; }
    static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
    void store(float* p) const { _mm256_storeu_ps(p, v); }
    void stream(float* p) const { _mm256_stream_ps(p, v); }  // p aligned to 32 bytes

    static Vec load_bf16(const uint16_t* p) {
        __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
    }
    static Vec load_f16(const uint16_t* p) {
        return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
    }
    // Round to nearest even; NaN stays NaN (quiet).
    void store_bf16(uint16_t* p) const {
        __m256i bits = _mm256_castps_si256(v);
        __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
        __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
    }
    void store_f16(uint16_t* p) const {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }

    friend Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
    friend Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
    friend Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
    friend Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
    static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
    static Vec fnma(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a * b
    // The second operand where one is NaN.
    static Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
    static Vec bit_and(Vec x, Vec mask) { return {_mm256_and_ps(x.v, mask.v)}; }
    static Vec zero_where_zero(Vec x, Vec where) {
        return {_mm256_and_ps(x.v, _mm256_cmp_ps(where.v, _mm256_setzero_ps(), _CMP_NEQ_UQ))};
    }
    static Vec difference(Vec a, Vec b) {  // a - b; 0 where they are equal, infinities included
        return {_mm256_and_ps(_mm256_sub_ps(a.v, b.v), _mm256_cmp_ps(a.v, b.v, _CMP_NEQ_UQ))};
    }
    static Vec where_positive(Vec x, Vec a, Vec b) {  // a where x > 0 or NaN
        return {_mm256_blendv_ps(b.v, a.v, _mm256_cmp_ps(x.v, _mm256_setzero_ps(), _CMP_NLE_UQ))};
    }
    bool all_between(float low, float high) const {
        return _mm256_movemask_ps(_mm256_and_ps(_mm256_cmp_ps(v, _mm256_set1_ps(low), _CMP_GT_OQ),
                                                _mm256_cmp_ps(v, _mm256_set1_ps(high), _CMP_LT_OQ))) == 0xff;
    }
    // The low nine bits of x's pattern as a biased exponent: 2^(bits - 127), and 0 for bits = 0.
    static Vec exponent(Vec x) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x.v), 23))}; }

    // x = mantissa * 2^exponent with the mantissa in [sqrt(1/2), sqrt(2)), for positive normal x.
    void split(Vec& mantissa, Vec& exponent) const {
        __m256i bits = _mm256_castps_si256(v);
        __m256i e = _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(0x3f3504f3)), 23);
        mantissa.v = _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(e, 23)));
        exponent.v = _mm256_cvtepi32_ps(e);
    }

    float sum() const {
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
    }
    float max() const {
        __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        half = _mm_max_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
    }
    // The sums of four vectors, each added in the order of sum(), at about the cost of two.
    static void sum_each(Vec a, Vec b, Vec c, Vec d, float* out) {
        auto half = [](Vec x) { return _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1)); };
        auto pairs = [](__m128 x, __m128 y) { return _mm_add_ps(_mm_movelh_ps(x, y), _mm_movehl_ps(y, x)); };
        const __m128 ab = pairs(half(a), half(b)), cd = pairs(half(c), half(d));
        _mm_storeu_ps(out, _mm_add_ps(_mm_shuffle_ps(ab, cd, 0x88), _mm_shuffle_ps(ab, cd, 0xdd)));
    }
};

}  // namespace
}  // namespace camkd::cpu
