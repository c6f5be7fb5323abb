// Row-wise scaling, and the squared error of feature maps with its gradient, on a CPU.
#pragma once

#include "vec_math.h"

namespace camkd::cpu {
namespace {

// Elements per partial sum: short enough for float, the partial sums are added in double.
constexpr int64_t kErrorBlock = 2048;

// out[i] = f(i, count) for whole vectors, and once with count < width for the tail.
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

void scale_rows(const ScaleRowsArgs& args) {
    const int threads = useful_threads(args.N * args.C, args.threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t n = 0; n < args.N; ++n) {
        with_dtype(args.dtype, [&](auto t) {
            using T = decltype(t);
            const T* in = static_cast<const T*>(args.residual) + n * args.C;
            const Vec factor = Vec::set(args.factor[n * args.factor_stride]);
            map_row(args.C, static_cast<T*>(args.out) + n * args.C,
                    [&](int64_t i, int count) { return factor * load_some(in + i, count); });
        });
    }
}

template <class R, class F>
double squared_error(const R* r, const F* f, int64_t M) {
    double total = 0;
    for (int64_t begin = 0; begin < M; begin += kErrorBlock) {
        const int64_t end = std::min(begin + kErrorBlock, M);
        Vec sum = Vec::zero();
        for (int64_t i = begin; i < end; i += Vec::width) {
            const int count = int(std::min<int64_t>(Vec::width, end - i));
            Vec difference = load_some(r + i, count) - load_some(f + i, count);
            sum = Vec::fma(difference, difference, sum);
        }
        total += sum.sum();
    }
    return total;
}

// Calls f(student row, teacher row) with their element types.
template <class F>
inline void with_feature_rows(const FeatureArgs& args, int64_t n, F f) {
    with_dtype(args.student.dtype, [&](auto r) {
        with_dtype(args.teacher.dtype, [&](auto t) {
            f(row_start<decltype(r)>(args.student, args.N, n), row_start<decltype(t)>(args.teacher, args.N, n));
        });
    });
}

void feature_forward(const FeatureArgs& args) {
    const int threads = useful_threads(args.N * args.M, args.threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t n = 0; n < args.N; ++n) {
        with_feature_rows(args, n, [&](const auto* r, const auto* f) {
            args.error[n] = float(squared_error(r, f, args.M) / double(args.M));
        });
    }
}

void feature_backward(const FeatureArgs& args) {
    const int threads = useful_threads(args.N * args.M, args.threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t n = 0; n < args.N; ++n) {
        const Vec factor = Vec::set(args.grad_error[n] * 2.0f / float(args.M));
        with_dtype(args.student.dtype, [&](auto t) {
            auto* out = static_cast<decltype(t)*>(args.grad) + n * args.M;
            with_feature_rows(args, n, [&](const auto* r, const auto* f) {
                map_row(args.M, out, [&](int64_t i, int count) {
                    return factor * (load_some(r + i, count) - load_some(f + i, count));
                });
            });
        });
    }
}

}  // namespace
}  // namespace camkd::cpu
