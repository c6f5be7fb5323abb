// Access to rows of any alignment in 16-byte vectors, and the thread groups of the kernels outside row_loss/.
//
// Vector v of a row holds columns v * V - phase ... + V - 1. If all matrices of a launch have the same alignment
// (`wide`), `phase` makes every vector start at a 16-byte boundary of memory, whatever C is. Only the first and the
// last vector are then read element by element, with -inf outside the row. Otherwise phase is 0 and all vectors are.
#pragma once

#include "elements.cuh"

namespace camkd::cuda {

CAMKD_DEVICE const char* row_address(const Matrix& matrix, int64_t S, int64_t row) {
    const int64_t outer = row < S ? 0 : row / S;  // a 64-bit division takes a hundred instructions
    return static_cast<const char*>(matrix.data) +
           (outer * matrix.stride_outer + (row - outer * S) * matrix.stride_inner) * element_bytes(matrix.dtype);
}

struct Columns {
    int C, phase, vectors;
    int first_whole, whole;  // first vector within the row at an aligned address, and their number
};

template <class T>
CAMKD_DEVICE Columns columns_of(int C, bool wide, const void* row) {
    constexpr int V = kVector<T>;
    const int phase = wide ? int(reinterpret_cast<uintptr_t>(row) % sizeof(Pack) / sizeof(T)) : 0;
    const int first = phase ? 1 : 0, whole = (C + phase) / V - first;
    return {C, phase, (C + phase + V - 1) / V, first, wide && whole > 0 ? whole : 0};
}

// True if vector v can be accessed in one instruction.
CAMKD_DEVICE bool whole_vector(const Columns& columns, int v) {
    return unsigned(v - columns.first_whole) < unsigned(columns.whole);
}

template <class T>
CAMKD_DEVICE const char* vector_address(const char* row, const Columns& columns, int v) {
    return row + (int64_t(v) * kVector<T> - columns.phase) * int64_t(sizeof(T));
}

// Reads vector v element by element.
template <class T>
CAMKD_DEVICE Pack gather(const char* row, DType dtype, const Columns& columns, int v, float outside) {
    float x[kVector<T>];
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) {
        const int c = v * kVector<T> - columns.phase + j;
        x[j] = c >= 0 && c < columns.C ? load_element(row, c, sizeof(T) == 2 ? Elements<T>::dtype : dtype) : outside;
    }
    return Elements<T>::pack(x);
}

template <class T>
CAMKD_DEVICE void load_vector(const char* row, DType dtype, const Columns& columns, int v, float outside,
                              float (&x)[kVector<T>]) {
    const Pack p = whole_vector(columns, v) ? load_pack(vector_address<T>(row, columns, v))
                                            : gather<T>(row, dtype, columns, v, outside);
    Elements<T>::unpack(p, x);
}

template <class T>
CAMKD_DEVICE void store_vector(char* row, DType dtype, const Columns& columns, int v, const float (&x)[kVector<T>]) {
    if (whole_vector(columns, v)) {
        store_pack(const_cast<char*>(vector_address<T>(row, columns, v)), Elements<T>::pack(x));
        return;
    }
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) {
        const int c = v * kVector<T> - columns.phase + j;
        if (c >= 0 && c < columns.C) store_element(row, c, sizeof(T) == 2 ? Elements<T>::dtype : dtype, x[j]);
    }
}

// The threads that share a row: a warp or the block. row_loss/ has its own, RowGroup.
struct ThreadGroup {
    bool is_warp;
    int member, members;   // threads of the group
    int64_t index, count;  // of groups in the grid

    CAMKD_DEVICE ThreadGroup(bool warp_per_row) : is_warp(warp_per_row) {
        const int warps = block_threads() / kWarp;
        member = warp_per_row ? thread_id() % kWarp : thread_id();
        members = warp_per_row ? kWarp : block_threads();
        index = warp_per_row ? block_id() * warps + thread_id() / kWarp : block_id();
        count = warp_per_row ? block_count() * warps : block_count();
    }
    CAMKD_DEVICE void barrier() const {
        if (is_warp)
            warp_barrier();
        else
            block_barrier();
    }
};

}  // namespace camkd::cuda
