// The scaling of a finished gradient.
#pragma once

#include "api.h"
#include "launch_table.h"
#include "rows.cuh"

namespace camkd::cuda {

struct ScaleLaunch {
    ScaleRowsArgs args;
    bool wide;
};

// 0 stays 0, as in ignored rows, whatever the factor.
CAMKD_DEVICE float scaled(float x, float factor) {
    return x == 0 ? 0.0f : x * factor;
}

// Treats the matrix as one long row, so that accesses are wide whatever its width. `out` may be `grad`.
template <class T>
CAMKD_KERNEL(kBlockThreads, 2)
scale_rows_kernel(CAMKD_PARAMETER ScaleLaunch launch) {
    constexpr int V = kVector<T>;
    const ScaleRowsArgs& args = launch.args;
    // `loss.backward()` multiplies by 1, which only the device knows
    if (args.factor_stride == 0 && args.out == args.grad && args.factor[0] * args.number == 1.0f) return;
    const int64_t elements = args.N * args.C, vectors = (elements + V - 1) / V;
    const char* from = static_cast<const char*>(args.grad);
    char* to = static_cast<char*>(args.out);
    const int64_t stride = block_count() * block_threads();
    for (int64_t v = block_id() * block_threads() + thread_id(); v < vectors; v += stride) {
        const int64_t first = v * V;
        int64_t row = args.factor_stride == 0 ? 0 : first / args.C;
        int64_t left =
            args.factor_stride == 0 ? V : (row + 1) * args.C - first;  // elements of this row from `first` on
        float factor = args.factor[row * args.factor_stride] * args.number, factors[V];
#pragma unroll
        for (int j = 0; j < V; ++j) {
            if (left == 0) {
                left = args.C;
                if (++row < args.N) factor = args.factor[row] * args.number;
            }
            --left;
            factors[j] = factor;
        }
        if (launch.wide && first + V <= elements) {
            float x[V];
            Elements<T>::unpack(load_pack_coherent(from + first * int64_t(sizeof(T))), x);
#pragma unroll
            for (int j = 0; j < V; ++j) x[j] = scaled(x[j], factors[j]);
            store_pack(to + first * int64_t(sizeof(T)), Elements<T>::pack(x));
            continue;
        }
#pragma unroll
        for (int j = 0; j < V; ++j)
            if (first + j < elements)
                store_element(to, first + j, args.dtype, scaled(load_element(from, first + j, args.dtype), factors[j]));
    }
}

}  // namespace camkd::cuda
