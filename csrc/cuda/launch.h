// The host side of every launch: limits of the device, alignment of matrices, and the launch itself. tests/cuda/host/
// replaces the part that needs the CUDA runtime, runtime.h.
#pragma once

#include <initializer_list>

#include "api.h"
#include "elements.cuh"
#include "launch_table.h"

#ifdef CAMKD_LAUNCH_HEADER
#include CAMKD_LAUNCH_HEADER
#else

#include "runtime.h"

namespace camkd::cuda {

template <class Launch>
int64_t resident_blocks(void (*kernel)(Launch), const LaunchConfig& config) {
    return resident_blocks_of(reinterpret_cast<const void*>(kernel), config);
}

template <class Launch>
void launch_kernel(void (*kernel)(Launch), const LaunchConfig& config, const Launch& launch,
                   const LaunchOptions& options) {
    launch_address(reinterpret_cast<const void*>(kernel), config, const_cast<Launch*>(&launch), options);
}

template <class Variable>
void* device_address(const Variable& variable) {
    return address_of_variable(&variable);
}

}  // namespace camkd::cuda

#endif

namespace camkd::cuda {

// True if each row has the same offset from a 16-byte boundary in all these matrices of N rows, S per outer stride.
inline bool aligned_alike(const Matrix* const* matrices, int count, int64_t N, int64_t S) {
    auto bytes = [](const Matrix& m, int64_t elements) {
        return uint64_t(elements) * (m.dtype == DType::f32 ? 4 : 2) % sizeof(Pack);
    };
    auto address = [](const Matrix& m) { return reinterpret_cast<uintptr_t>(m.data) % sizeof(Pack); };
    const Matrix& one = *matrices[0];
    for (int i = 1; i < count; ++i) {
        const Matrix& other = *matrices[i];
        if (other.dtype != one.dtype || address(other) != address(one)) return false;
        // The stride of a dimension of size 1 is never used, and arbitrary in torch
        if (S > 1 && bytes(other, other.stride_inner) != bytes(one, one.stride_inner)) return false;
        if (N > S && bytes(other, other.stride_outer) != bytes(one, one.stride_outer)) return false;
    }
    return true;
}

inline bool aligned_alike(std::initializer_list<const Matrix*> matrices, int64_t N, int64_t S) {
    return aligned_alike(matrices.begin(), int(matrices.size()), N, S);
}

// A contiguous (N, C) output.
inline Matrix dense(const void* data, int64_t C, int64_t S, DType dtype) {
    return {data, S * C, C, dtype};
}

// How a kernel of the logit loss may access its rows.
struct RowAccess {
    bool mixed;     // the dtypes differ
    bool wide_in;   // all inputs have the same alignment, so rows are read in 16-byte vectors
    bool wide_out;  // the gradient has that alignment too
};

inline RowAccess row_access(const RowLossArgs& args) {
    RowAccess access{};
    const Matrix& student = args.streams[0];
    const Matrix* inputs[kMaxStreams];
    for (int k = 0; k <= args.K; ++k) {
        inputs[k] = &args.streams[k];
        access.mixed = access.mixed || args.streams[k].dtype != student.dtype;
    }
    access.wide_in = !access.mixed && aligned_alike(inputs, args.K + 1, args.N, args.S);
    const Matrix grad = dense(args.grad_student, args.C, args.S, student.dtype);
    access.wide_out = access.wide_in && aligned_alike({&student, &grad}, args.N, args.S);
    return access;
}

// Calls f(T{}) with the element type of the kernel for these dtypes; float serves mixed dtypes too.
template <class F>
void with_element(DType dtype, bool mixed, F f) {
    if (mixed || dtype == DType::f32)
        f(float{});
    else if (dtype == DType::bf16)
        f(bf16{});
    else
        f(f16{});
}

}  // namespace camkd::cuda
