// Matrices as every compiled kernel gets them: an address, two row strides in elements and a dtype code.
#pragma once

#include <cstdint>

namespace camkd {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// N rows of unit column stride; row n starts at (n / inner) * stride_outer + (n % inner) * stride_inner.
struct Matrix {
    const void* data;
    int64_t stride_outer, stride_inner;
    DType dtype;
};

}  // namespace camkd
