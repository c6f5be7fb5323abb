// Element types, and the conversion of 16-byte packs of them to and from floats.
#pragma once

#include "../row_math.h"
#include "device.cuh"

namespace camkd::cuda {

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

template <class T>
constexpr int kVector = int(sizeof(Pack) / sizeof(T));

template <class T>
struct Elements;

template <>
struct Elements<float> {
    static constexpr DType dtype = DType::f32;
    static constexpr uint32_t lowest = 0xff800000u;  // -inf in every element of a word
    static CAMKD_DEVICE void unpack(Pack p, float (&x)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = bits_to_float(p.word[i]);
    }
    static CAMKD_DEVICE void unpack_part(const Pack* p, int, float (&x)[4]) { unpack(*p, x); }
    static CAMKD_DEVICE Pack pack(const float (&x)[4]) {
        Pack p;
#pragma unroll
        for (int i = 0; i < 4; ++i) p.word[i] = float_to_bits(x[i]);
        return p;
    }
    static CAMKD_DEVICE uint32_t max(uint32_t a, uint32_t b) {
        return float_to_bits(fmaxf(bits_to_float(a), bits_to_float(b)));
    }
};

template <>
struct Elements<bf16> {
    static constexpr DType dtype = DType::bf16;
    static constexpr uint32_t lowest = 0xff80ff80u;
    static CAMKD_DEVICE void unpack(Pack p, float (&x)[8]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            x[2 * i] = bits_to_float(p.word[i] << 16);
            x[2 * i + 1] = bits_to_float(p.word[i] & 0xffff0000u);
        }
    }
    static CAMKD_DEVICE void unpack_part(const Pack* p, int, float (&x)[8]) { unpack(*p, x); }
    static CAMKD_DEVICE void unpack_part(const Pack* p, int part, float (&x)[4]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t word = p->word[2 * part + i];
            x[2 * i] = bits_to_float(word << 16);
            x[2 * i + 1] = bits_to_float(word & 0xffff0000u);
        }
    }
    static CAMKD_DEVICE Pack pack(const float (&x)[8]) {
        Pack p;
#pragma unroll
        for (int i = 0; i < 4; ++i) p.word[i] = floats_to_bfloats(x[2 * i], x[2 * i + 1]);
        return p;
    }
    static CAMKD_DEVICE uint32_t max(uint32_t a, uint32_t b) { return max_bfloats(a, b); }
};

template <>
struct Elements<f16> {
    static constexpr DType dtype = DType::f16;
    static constexpr uint32_t lowest = 0xfc00fc00u;
    static CAMKD_DEVICE void unpack(Pack p, float (&x)[8]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            x[2 * i] = half_to_float(p.word[i] & 0xffffu);
            x[2 * i + 1] = half_to_float(p.word[i] >> 16);
        }
    }
    static CAMKD_DEVICE void unpack_part(const Pack* p, int, float (&x)[8]) { unpack(*p, x); }
    static CAMKD_DEVICE void unpack_part(const Pack* p, int part, float (&x)[4]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t word = p->word[2 * part + i];
            x[2 * i] = half_to_float(word & 0xffffu);
            x[2 * i + 1] = half_to_float(word >> 16);
        }
    }
    static CAMKD_DEVICE Pack pack(const float (&x)[8]) {
        Pack p;
#pragma unroll
        for (int i = 0; i < 4; ++i) p.word[i] = floats_to_halves(x[2 * i], x[2 * i + 1]);
        return p;
    }
    static CAMKD_DEVICE uint32_t max(uint32_t a, uint32_t b) { return max_halves(a, b); }
};

template <class T>
CAMKD_DEVICE Pack lowest_pack() {
    Pack p;
#pragma unroll
    for (int i = 0; i < 4; ++i) p.word[i] = Elements<T>::lowest;
    return p;
}

template <class T>
CAMKD_DEVICE Pack max_pack(Pack a, Pack b) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a.word[i] = Elements<T>::max(a.word[i], b.word[i]);
    return a;
}

template <class T>
CAMKD_DEVICE float highest(Pack p) {
    float x[kVector<T>];
    Elements<T>::unpack(p, x);
#pragma unroll
    for (int i = 1; i < kVector<T>; ++i) x[0] = fmaxf(x[0], x[i]);
    return x[0];
}

// Element j of a pack, as a float.
template <class T>
CAMKD_DEVICE float element_of(const Pack& p, int j) {
    if (sizeof(T) == 4) return bits_to_float(p.word[j]);
    const uint32_t bits = p.word[j / 2] >> (j % 2 * 16) & 0xffffu;
    return Elements<T>::dtype == DType::bf16 ? bits_to_float(bits << 16) : half_to_float(bits);
}

// One element, as its bits and as a float. The kernels for float also serve mixed dtypes, which they access element by
// element.
CAMKD_DEVICE uint32_t load_bits(const char* row, int64_t c, DType dtype) {
    if (dtype == DType::f32) return reinterpret_cast<const uint32_t*>(row)[c];
    return reinterpret_cast<const uint16_t*>(row)[c];
}

CAMKD_DEVICE float element_from(uint32_t bits, DType dtype) {
    return dtype == DType::f32    ? bits_to_float(bits)
           : dtype == DType::bf16 ? bits_to_float(bits << 16)
                                  : half_to_float(bits);
}

CAMKD_DEVICE float load_element(const char* row, int64_t c, DType dtype) {
    return element_from(load_bits(row, c, dtype), dtype);
}

CAMKD_DEVICE void store_element(char* row, int64_t c, DType dtype, float x) {
    if (dtype == DType::f32)
        reinterpret_cast<float*>(row)[c] = x;
    else
        reinterpret_cast<uint16_t*>(row)[c] =
            uint16_t(dtype == DType::bf16 ? floats_to_bfloats(x, 0.0f) : floats_to_halves(x, 0.0f));
}

CAMKD_DEVICE int element_bytes(DType dtype) {
    return dtype == DType::f32 ? 4 : 2;
}

}  // namespace camkd::cuda
