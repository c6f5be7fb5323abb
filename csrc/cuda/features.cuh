// The squared error of feature maps and its gradient, in one pass over both maps of each pair. The work items are the
// samples of all K pairs, or parts of them, whose sizes differ, in one launch; the last block adds up.
#pragma once

#include "api.h"
#include "batch_mean.cuh"
#include "launch_table.h"
#include "rows.cuh"

namespace camkd::cuda {

struct FeatureLaunch {
    FeatureArgs args;
    bool warp_per_row;
    int parts;
    float* partial;      // (K, N, parts): mean errors of the parts; args.error itself for one part
    uint32_t* arrivals;  // null if another launch adds up, or nothing is to be added
};

// Tiles of maps in different memory orders, which a warp transposes in shared memory.
constexpr int kTile = kWarp;
struct FeatureTile {
    float value[kTile][kTile + 1];  // padded, so that neither rows nor columns share a bank
};

// Where a group works: addresses of a sample, or of a dense part of one, and the factor of its gradient.
struct FeaturePart {
    const char *r, *f;
    char* out;  // null if no gradient is wanted
    float coefficient;
};

CAMKD_DEVICE float weight_of(const FeatureArgs& args, int k, int64_t n) {
    return args.weights ? args.weights[k * args.weight_stride_k + n * args.weight_stride_n] : 1.0f;
}

CAMKD_DEVICE float scale_of(const FeatureArgs& args) {
    return args.scale_device ? args.scale * *args.scale_device : args.scale;
}

// The error of a sample or part; one of weight 0 counts only if it is finite.
CAMKD_DEVICE float counted(float error, float weight) {
    return weight == 0 && !(fabsf(error) < INFINITY) ? 0.0f : error;
}

// A gradient; exactly 0 for a coefficient of 0, whatever the difference.
CAMKD_DEVICE float gradient_of(float coefficient, float difference) {
    return coefficient == 0 ? 0.0f : coefficient * difference;
}

// kFeatureStep consecutive elements.
template <class T>
struct FeatureStep {
    static constexpr int kPacks = kFeatureStep / kVector<T>;
    Pack packs[kPacks];

    CAMKD_DEVICE void load(const char* p) {
#pragma unroll
        for (int i = 0; i < kPacks; ++i) packs[i] = load_pack(p + i * sizeof(Pack));
    }
    CAMKD_DEVICE void unpack(float (&x)[kFeatureStep]) const {
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
            float part[kVector<T>];
            Elements<T>::unpack(packs[i], part);
#pragma unroll
            for (int j = 0; j < kVector<T>; ++j) x[i * kVector<T> + j] = part[j];
        }
    }
    static CAMKD_DEVICE void store(char* p, const float (&x)[kFeatureStep]) {
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
            float part[kVector<T>];
#pragma unroll
            for (int j = 0; j < kVector<T>; ++j) part[j] = x[i * kVector<T> + j];
            store_pack(p + i * sizeof(Pack), Elements<T>::pack(part));
        }
    }
};

// Elements before the next 16-byte boundary.
template <class T>
CAMKD_DEVICE int before_boundary(const void* p) {
    return int((0 - reinterpret_cast<uintptr_t>(p)) % sizeof(Pack) / sizeof(T));
}

// Elements before all three addresses are at 16-byte boundaries; `count` if they never are.
template <class R, class F>
CAMKD_DEVICE int misaligned(const FeaturePart& part, int count) {
    const int r = before_boundary<R>(part.r), f = before_boundary<F>(part.f), head = sizeof(F) < sizeof(R) ? f : r;
    const bool alike =
        head % kVector<R> == r && head % kVector<F> == f && (!part.out || before_boundary<R>(part.out) == r);
    return alike && head < count ? head : count;
}

// The squared error of one step; stores its gradient.
template <class R, class F>
CAMKD_DEVICE float step_error(const FeatureStep<R>& r, const FeatureStep<F>& f, float coefficient, char* out) {
    float x[kFeatureStep], y[kFeatureStep], sum = 0;
    r.unpack(x);
    f.unpack(y);
#pragma unroll
    for (int j = 0; j < kFeatureStep; ++j) {
        x[j] -= y[j];
        sum += x[j] * x[j];
        x[j] = gradient_of(coefficient, x[j]);
    }
    if (out) FeatureStep<R>::store(out, x);
    return sum;
}

// This thread's part of the squared error of `count` dense values. Several steps are loaded at once, enough to keep the
// memory busy.
template <class R, class F>
CAMKD_DEVICE float dense_error(const ThreadGroup& group, const FeaturePart& part, int count) {
    constexpr int kUnroll = sizeof(R) + sizeof(F) == 4 ? 4 : 2;
    constexpr int64_t kBytesR = kFeatureStep * sizeof(R), kBytesF = kFeatureStep * sizeof(F);
    const int head = misaligned<R, F>(part, count), steps = (count - head) / kFeatureStep;
    const char *r = part.r + head * sizeof(R), *f = part.f + head * sizeof(F);
    char* const out = part.out ? part.out + head * sizeof(R) : nullptr;
    const auto out_of = [&](int step) { return out ? out + step * kBytesR : nullptr; };
    float sum = 0;
    int step = group.member;
    for (; step + (kUnroll - 1) * group.members < steps; step += kUnroll * group.members) {
        FeatureStep<R> x[kUnroll];
        FeatureStep<F> y[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            x[i].load(r + (step + i * group.members) * kBytesR);
            y[i].load(f + (step + i * group.members) * kBytesF);
        }
        float some = 0;
#pragma unroll
        for (int i = 0; i < kUnroll; ++i)
            some += step_error(x[i], y[i], part.coefficient, out_of(step + i * group.members));
        sum += some;
    }
    for (; step < steps; step += group.members) {
        FeatureStep<R> x;
        FeatureStep<F> y;
        x.load(r + step * kBytesR);
        y.load(f + step * kBytesF);
        sum += step_error(x, y, part.coefficient, out_of(step));
    }
    // The elements before and after the steps
    for (int i = group.member; i < count - steps * kFeatureStep; i += group.members) {
        const int at = i < head ? i : i + steps * kFeatureStep;
        const float d = load_element(part.r, at, Elements<R>::dtype) - load_element(part.f, at, Elements<F>::dtype);
        sum += d * d;
        if (part.out) store_element(part.out, at, Elements<R>::dtype, gradient_of(part.coefficient, d));
    }
    return sum;
}

// The same for the rows [p, p_end) of a sample of any strides. A warp loads a tile of the teacher's map along the
// shorter of its strides, and then works along the gradient.
CAMKD_DEVICE float strided_error(const ThreadGroup& group, const FeatureArgs& args, int k, const FeaturePart& part,
                                 int p_begin, int p_end, FeatureTile& tile) {
    const FeatureMap &student = args.student[k], &teacher = args.teacher[k];
    const int Q = int(args.Q[k]), lane = thread_id() % kWarp;
    const bool along_p = teacher.stride_p < teacher.stride_q;
    const int across = (Q + kTile - 1) / kTile, tiles = across * ((p_end - p_begin + kTile - 1) / kTile);
    float sum = 0;
    for (int t = group.member / kWarp; t < tiles; t += group.members / kWarp) {
        const int p = p_begin + t / across * kTile, q = t % across * kTile;
        const int height = p_end - p < kTile ? p_end - p : kTile, width = Q - q < kTile ? Q - q : kTile;
#pragma unroll 8
        for (int i = 0; i < kTile; ++i) {
            const int row = along_p ? lane : i, column = along_p ? i : lane;
            if (row < height && column < width)
                tile.value[row][column] =
                    load_element(part.f, (p + row) * teacher.stride_p + (q + column) * teacher.stride_q, teacher.dtype);
        }
        warp_barrier();
#pragma unroll 8
        for (int row = 0; row < kTile; ++row) {
            if (row >= height || lane >= width) continue;
            const int64_t at = (p + row) * student.stride_p + (q + lane) * student.stride_q;
            const float d = load_element(part.r, at, student.dtype) - tile.value[row][lane];
            sum += d * d;
            if (part.out)
                store_element(part.out, int64_t(p + row) * Q + q + lane, student.dtype,
                              gradient_of(part.coefficient, d));
        }
        warp_barrier();  // all have read before the next tile overwrites
    }
    return sum;
}

// Calls f(T{}) with the element type that `dtype` names.
template <class Function>
CAMKD_DEVICE float with_element_of(DType dtype, Function f) {
    return dtype == DType::f32 ? f(float{}) : dtype == DType::bf16 ? f(bf16{}) : f(f16{});
}

// This thread's share of the squared error of part `index` of sample n of pair k; writes its gradient.
CAMKD_DEVICE float part_error(const FeatureLaunch& launch, const ThreadGroup& group, int k, int64_t n, int index,
                              float coefficient, FeatureTile* tiles) {
    const FeatureArgs& args = launch.args;
    const FeatureMap &student = args.student[k], &teacher = args.teacher[k];
    const int64_t r_bytes = element_bytes(student.dtype), f_bytes = element_bytes(teacher.dtype);
    const int64_t M = values_of(args, k);
    FeaturePart part{static_cast<const char*>(student.data) + n * student.stride_n * r_bytes,
                     static_cast<const char*>(teacher.data) + n * teacher.stride_n * f_bytes,
                     args.grads[k] ? static_cast<char*>(args.grads[k]) + n * M * r_bytes : nullptr, coefficient};
    const bool dense = is_dense(args, k);
    // Dense parts begin at multiples of a step, so that those of an aligned sample are aligned
    const int length = int(dense ? M : args.P[k]), unit = dense ? kFeatureStep : 1;
    const int share = ((length + unit - 1) / unit + launch.parts - 1) / launch.parts * unit;
    const int begin = index * share < length ? index * share : length;
    const int end = length - begin < share ? length : begin + share;
    if (!dense) return strided_error(group, args, k, part, begin, end, tiles[thread_id() / kWarp]);
    part.r += begin * r_bytes;
    part.f += begin * f_bytes;
    if (part.out) part.out += begin * r_bytes;
    return with_element_of(student.dtype, [&](auto r) {
        return with_element_of(teacher.dtype,
                               [&](auto f) { return dense_error<decltype(r), decltype(f)>(group, part, end - begin); });
    });
}

// By one block, when all parts are finished: writes the errors of divided samples, and the loss.
CAMKD_DEVICE void add_up(const FeatureLaunch& launch, float* of_warps) {
    const FeatureArgs& args = launch.args;
    float total = 0;
    for (int64_t item = thread_id(); item < args.N * args.K; item += block_threads()) {
        float error = launch.partial[item * launch.parts];
        for (int i = 1; i < launch.parts; ++i) error += launch.partial[item * launch.parts + i];
        if (launch.parts > 1) args.error[item] = error;
        const int k = int(item / args.N);
        const float weight = weight_of(args, k, item - k * args.N);
        if (weight != 0) total += weight * error;
    }
    if (!args.loss) return;
    total = block_sum(total, of_warps);
    if (thread_id() == 0) *args.loss = total * scale_of(args);
}

CAMKD_KERNEL(kBlockThreads, 3)
feature_kernel(CAMKD_PARAMETER FeatureLaunch launch) {
    const FeatureArgs& args = launch.args;
    const ThreadGroup group(launch.warp_per_row);
    const int warps = group.members / kWarp, warp = group.member / kWarp, lane = thread_id() % kWarp;
    float* const of_warps = reinterpret_cast<float*>(shared_memory());  // (kWarp), then the tiles
    FeatureTile* const tiles = reinterpret_cast<FeatureTile*>(of_warps + kWarp);
    const float scale = args.grads[0] ? scale_of(args) * args.grad_scale : 0.0f;
    const float factor = args.grad_scale_device && args.grads[0] ? scale * *args.grad_scale_device : scale;
    const int64_t items = args.N * args.K * launch.parts;
    for (int64_t i = group.index; i < items; i += group.count) {
        const int64_t item = launch.parts == 1 ? i : i / launch.parts;
        const int k = int(item / args.N), index = int(i - item * launch.parts);
        const int64_t n = item - k * args.N;
        const float M = float(values_of(args, k)), weight = weight_of(args, k, n);
        float sum = part_error(launch, group, k, n, index, weight * factor * (2.0f / M), tiles);
        if (!args.error) continue;
        sum = warp_sum(sum);
        if (warps > 1) {
            if (lane == 0) of_warps[warp] = sum;
            group.barrier();
            sum = warp_sum(lane < warps ? of_warps[lane] : 0.0f);
            group.barrier();  // all have read before the next item overwrites
        }
        if (group.member == 0) launch.partial[i] = counted(sum / M, weight);
    }
    if (launch.arrivals && last_block(launch.arrivals)) add_up(launch, of_warps);
}

CAMKD_KERNEL(kBlockThreads, 1)
feature_sum_kernel(CAMKD_PARAMETER FeatureLaunch launch) {
    add_up(launch, reinterpret_cast<float*>(shared_memory()));
}

}  // namespace camkd::cuda
