// A gradient times one factor, or times a factor per row, on a CPU. 0 stays 0, as in ignored rows, whatever the factor.
#pragma once

#include "vec_math.h"

namespace camkd::cpu {
namespace {

// out[i] = value(i, count) for whole vectors, and once with count < width for the tail.
template <class T, class F>
inline void map_row(int64_t n, T* out, F value) {
    int64_t i = 0;
    for (; i + Vec::width <= n; i += Vec::width) store(out + i, value(i, int(Vec::width)));
    if (i < n) store_tail(out + i, value(i, int(n - i)), int(n - i));
}

template <class T>
inline Vec load_some(const T* p, int count) {
    return count == Vec::width ? load(p) : load_tail(p, count, 0.0f);
}

void scale_rows(const ScaleRowsArgs& args, int max_threads) {
    const int threads = useful_threads(args.N * args.C, max_threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t n = 0; n < args.N; ++n) {
        with_dtype(args.dtype, [&](auto t) {
            using T = decltype(t);
            const T* grad = static_cast<const T*>(args.grad) + n * args.C;
            const Vec factor = Vec::set(args.factor[n * args.factor_stride] * args.number);
            map_row(args.C, static_cast<T*>(args.out) + n * args.C, [&](int64_t i, int count) {
                const Vec x = load_some(grad + i, count);
                return Vec::zero_where_zero(factor * x, x);
            });
        });
    }
}

}  // namespace
}  // namespace camkd::cpu
