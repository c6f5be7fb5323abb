// Row-wise scaling, and the squared error of feature maps with its gradient, on a CPU.
#pragma once

#include "vec_math.h"

namespace camkd::cpu {
namespace {

// Elements per partial sum: few enough for float. The partial sums are added in double.
constexpr int64_t kErrorBlock = 2048;

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
            const Vec factor = Vec::set(args.factor[n * args.factor_stride]);
            map_row(args.C, static_cast<T*>(args.out) + n * args.C,
                    [&](int64_t i, int count) { return factor * load_some(grad + i, count); });
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

// Calls f(student row, teacher row) of pair k with their element types.
template <class F>
inline void with_feature_rows(const FeatureArgs& args, int k, int64_t n, F f) {
    const Matrix &student = args.student[k], &teacher = args.teacher[k];
    with_dtype(student.dtype, [&](auto r) {
        with_dtype(teacher.dtype, [&](auto t) {
            f(row_start<decltype(r)>(student, args.N, n), row_start<decltype(t)>(teacher, args.N, n));
        });
    });
}

void feature_forward(const FeatureArgs& args, int max_threads) {
    for (int k = 0; k < args.K; ++k) {
        const int64_t M = args.M[k];
        const int threads = useful_threads(args.N * M, max_threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
        for (int64_t n = 0; n < args.N; ++n) {
            with_feature_rows(args, k, n, [&](const auto* r, const auto* f) {
                args.error[k * args.N + n] = float(squared_error(r, f, M) / double(M));
            });
        }
    }
}

void feature_backward(const FeatureArgs& args, int max_threads) {
    for (int k = 0; k < args.K; ++k) {
        const int64_t M = args.M[k];
        const int threads = useful_threads(args.N * M, max_threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
        for (int64_t n = 0; n < args.N; ++n) {
            const Vec factor = Vec::set(args.grad_error[k * args.N + n] * 2.0f / float(M));
            with_dtype(args.student[k].dtype, [&](auto t) {
                auto* out = static_cast<decltype(t)*>(args.grads[k]) + n * M;
                with_feature_rows(args, k, n, [&](const auto* r, const auto* f) {
                    map_row(M, out, [&](int64_t i, int count) {
                        return factor * (load_some(r + i, count) - load_some(f + i, count));
                    });
                });
            });
        }
    }
}

}  // namespace
}  // namespace camkd::cpu
