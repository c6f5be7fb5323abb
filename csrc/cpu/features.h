// The squared error of feature maps and its gradient on a CPU, in one pass over both maps. Samples run in parallel.
#pragma once

#include "vec_math.h"

namespace camkd::cpu {
namespace {

// Values per partial sum: few enough for float. The partial sums are added in double.
constexpr int64_t kErrorBlock = 2048;

// The squared error of n consecutive values, and with `Grad` their gradients g (r - f). `streaming` stores bypass the
// cache.
template <bool Grad, class R, class F>
float feature_block(const R* r, const F* f, R* out, Vec g, int n, bool streaming) {
    constexpr int W = Vec::width;
    Vec sums[4];
    each<4>([&](int j) { sums[j] = Vec::zero(); });
    const bool past_cache = streaming && reinterpret_cast<uintptr_t>(out) % sizeof(Vec) == 0;
    int i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
        Vec d[4];
        each<4>([&](int j) { d[j] = load(r + i + j * W) - load(f + i + j * W); });
        each<4>([&](int j) { sums[j] = Vec::fma(d[j], d[j], sums[j]); });
        if constexpr (Grad && sizeof(R) == sizeof(float)) {
            if (past_cache) {
                each<4>([&](int j) { (g * d[j]).stream(out + i + j * W); });
                continue;
            }
        }
        if constexpr (Grad) each<4>([&](int j) { store(out + i + j * W, g * d[j]); });
    }
    for (; i < n; i += W) {
        const int count = std::min(W, n - i);
        const Vec d = load_tail(r + i, count, 0.0f) - load_tail(f + i, count, 0.0f);
        sums[0] = Vec::fma(d, d, sums[0]);
        if constexpr (Grad) store_tail(out + i, g * d, count);
    }
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])).sum();
}

// Copies the values [p, p_end) x [q, q_end) of a sample to consecutive memory, along the shorter stride.
template <class T>
void gather(const T* sample, const FeatureMap& map, int64_t p, int64_t p_end, int64_t q, int64_t q_end, T* to) {
    const int64_t width = q_end - q, height = p_end - p;
    const T* from = sample + p * map.stride_p + q * map.stride_q;
    if (map.stride_p < map.stride_q) {
        for (int64_t j = 0; j < width; ++j)
            for (int64_t i = 0; i < height; ++i) to[i * width + j] = from[i * map.stride_p + j * map.stride_q];
    } else {
        for (int64_t i = 0; i < height; ++i)
            for (int64_t j = 0; j < width; ++j) to[i * width + j] = from[i * map.stride_p + j * map.stride_q];
    }
}

// The squared error of sample n of pair k, and with `Grad` its gradient.
template <bool Grad, class R, class F>
double feature_sample(const FeatureArgs& args, int k, int64_t n, float coefficient, bool streaming) {
    const FeatureMap &student = args.student[k], &teacher = args.teacher[k];
    const int64_t P = args.P[k], Q = args.Q[k], M = P * Q;
    const R* r = static_cast<const R*>(student.data) + n * student.stride_n;
    const F* f = static_cast<const F*>(teacher.data) + n * teacher.stride_n;
    R* out = Grad ? static_cast<R*>(args.grads[k]) + n * M : nullptr;
    const Vec g = Vec::set(coefficient);
    double total = 0;
    if (is_dense(args, k)) {
        for (int64_t i = 0; i < M; i += kErrorBlock)
            total += feature_block<Grad>(r + i, f + i, Grad ? out + i : nullptr, g, int(std::min(kErrorBlock, M - i)),
                                         streaming);
        return total;
    }
    // Tiles of a few whole rows, or of a part of one row: consecutive in the gradient
    R from_student[kErrorBlock];
    F from_teacher[kErrorBlock];
    const int64_t width = std::min(Q, kErrorBlock), height = kErrorBlock / width;
    for (int64_t p = 0; p < P; p += width == Q ? height : 1) {
        const int64_t p_end = width == Q ? std::min(P, p + height) : p + 1;
        for (int64_t q = 0; q < Q; q += width) {
            const int64_t q_end = std::min(Q, q + width);
            gather(r, student, p, p_end, q, q_end, from_student);
            gather(f, teacher, p, p_end, q, q_end, from_teacher);
            total += feature_block<Grad>(from_student, from_teacher, Grad ? out + p * Q + q : nullptr, g,
                                         int((p_end - p) * (q_end - q)), streaming);
        }
    }
    return total;
}

// The squared error of sample n of pair k; writes its gradient, which is 0 for a weight of 0, if it is wanted.
double feature_sample(const FeatureArgs& args, int k, int64_t n, float weight, bool streaming) {
    const bool grad = args.grads[k] != nullptr;
    const int64_t M = values_of(args, k);
    const float coefficient = weight * (args.scale * args.grad_scale) * 2.0f / float(M);
    return with_dtype(args.student[k].dtype, [&](auto r) {
        using R = decltype(r);
        if (grad && weight == 0) std::memset(static_cast<R*>(args.grads[k]) + n * M, 0, M * sizeof(R));
        return with_dtype(args.teacher[k].dtype, [&](auto f) {
            using F = decltype(f);
            return grad && weight != 0 ? feature_sample<true, R, F>(args, k, n, coefficient, streaming)
                                       : feature_sample<false, R, F>(args, k, n, coefficient, streaming);
        });
    });
}

void features(const FeatureArgs& args, int max_threads) {
    const auto weight_of = [&](int k, int64_t n) {
        return args.weights ? args.weights[k * args.weight_stride_k + n * args.weight_stride_n] : 1.0f;
    };
    int64_t values = 0;
    for (int k = 0; k < args.K; ++k) values += args.N * values_of(args, k);
    const int threads = useful_threads(values, max_threads);
    const bool streaming = values * int64_t(args.student[0].dtype == DType::f32 ? 4 : 2) > kStreamingBytes;
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2) if (threads > 1)
    for (int64_t n = 0; n < args.N; ++n) {
        for (int k = 0; k < args.K; ++k) {
            const float weight = weight_of(k, n);
            const float error = float(feature_sample(args, k, n, weight, streaming) / double(values_of(args, k)));
            if (args.error) args.error[k * args.N + n] = weight == 0 && !std::isfinite(error) ? 0.0f : error;
        }
    }
    if (!args.loss) return;
    double total = 0;
    for (int64_t n = 0; n < args.N; ++n)
        for (int k = 0; k < args.K; ++k)
            if (const float weight = weight_of(k, n)) total += double(weight) * double(args.error[k * args.N + n]);
    *args.loss = float(total * double(args.scale));
}

}  // namespace
}  // namespace camkd::cpu
