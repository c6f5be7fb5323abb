// The kernels without exponentials: the feature error and its gradient, and the scaling of a finished gradient. The
// work items of the feature kernels are the N samples of all K teachers, whose widths M differ, in one launch.
#pragma once

#include "api.h"
#include "launch_table.h"
#include "rows.cuh"

namespace camkd::cuda {

struct FeatureLaunch {
    FeatureArgs args;
    int M[kMaxTeachers];  // columns fit 32 bits on the device
    bool warp_per_row;
    bool wide[kMaxTeachers];
};

// error[k, n], by a warp or a block each.
template <class T>
CAMKD_KERNEL(kBlockThreads, 2)
feature_fwd_kernel(CAMKD_PARAMETER FeatureLaunch launch) {
    constexpr int V = kVector<T>;
    const FeatureArgs& args = launch.args;
    const ThreadGroup group(launch.warp_per_row);
    const int warps = group.members / kWarp, warp = group.member / kWarp, lane = thread_id() % kWarp;
    float* const partial = reinterpret_cast<float*>(shared_memory());
    for (int64_t item = group.index; item < args.N * args.K; item += group.count) {
        const int k = int(item / args.N);
        const int64_t n = item - k * args.N;
        const Matrix &student = args.student[k], &teacher = args.teacher[k];
        const char *r = row_address(student, args.N, n), *f = row_address(teacher, args.N, n);
        const Columns columns = columns_of<T>(launch.M[k], launch.wide[k], r);
        float sum = 0;
        for (int v = group.member; v < columns.vectors; v += group.members) {
            float x[V], y[V];
            load_vector<T>(r, student.dtype, columns, v, 0.0f, x);
            load_vector<T>(f, teacher.dtype, columns, v, 0.0f, y);
#pragma unroll
            for (int j = 0; j < V; ++j) sum += (x[j] - y[j]) * (x[j] - y[j]);
        }
        sum = warp_sum(sum);
        if (warps > 1) {
            if (lane == 0) partial[warp] = sum;
            group.barrier();
            sum = warp_sum(lane < warps ? partial[lane] : 0.0f);
            group.barrier();  // all have read before the next item overwrites
        }
        if (group.member == 0) args.error[item] = sum / float(launch.M[k]);
    }
}

template <class T>
CAMKD_KERNEL(kBlockThreads, 2)
feature_bwd_kernel(CAMKD_PARAMETER FeatureLaunch launch) {
    constexpr int V = kVector<T>;
    const FeatureArgs& args = launch.args;
    const ThreadGroup group(launch.warp_per_row);
    for (int64_t item = group.index; item < args.N * args.K; item += group.count) {
        const int k = int(item / args.N);
        const int64_t n = item - k * args.N;
        const Matrix &student = args.student[k], &teacher = args.teacher[k];
        const char *r = row_address(student, args.N, n), *f = row_address(teacher, args.N, n);
        char* out = static_cast<char*>(args.grads[k]) + n * launch.M[k] * element_bytes(student.dtype);
        const Columns columns = columns_of<T>(launch.M[k], launch.wide[k], out);
        const float g = args.grad_error[item] * (2.0f / float(launch.M[k]));
        for (int v = group.member; v < columns.vectors; v += group.members) {
            float x[V], y[V];
            load_vector<T>(r, student.dtype, columns, v, 0.0f, x);
            load_vector<T>(f, teacher.dtype, columns, v, 0.0f, y);
#pragma unroll
            for (int j = 0; j < V; ++j) x[j] = g * (x[j] - y[j]);
            store_vector<T>(out, student.dtype, columns, v, x);
        }
    }
}

struct ScaleLaunch {
    ScaleRowsArgs args;
    bool wide;
};

// Treats the matrix as one long row, so that accesses are wide whatever its width. `out` may be `grad`.
template <class T>
CAMKD_KERNEL(kBlockThreads, 2)
scale_rows_kernel(CAMKD_PARAMETER ScaleLaunch launch) {
    constexpr int V = kVector<T>;
    const ScaleRowsArgs& args = launch.args;
    // `loss.backward()` multiplies by 1, which only the device knows
    if (args.factor_stride == 0 && args.out == args.grad && args.factor[0] == 1.0f) return;
    const int64_t elements = args.N * args.C, vectors = (elements + V - 1) / V;
    const char* from = static_cast<const char*>(args.grad);
    char* to = static_cast<char*>(args.out);
    const int64_t stride = block_count() * block_threads();
    for (int64_t v = block_id() * block_threads() + thread_id(); v < vectors; v += stride) {
        const int64_t first = v * V;
        int64_t row = args.factor_stride == 0 ? 0 : first / args.C;
        int64_t left =
            args.factor_stride == 0 ? V : (row + 1) * args.C - first;  // elements of this row from `first` on
        float factor = args.factor[row * args.factor_stride], factors[V];
#pragma unroll
        for (int j = 0; j < V; ++j) {
            if (left == 0) {
                left = args.C;
                if (++row < args.N) factor = args.factor[row];
            }
            --left;
            factors[j] = factor;
        }
        if (launch.wide && first + V <= elements) {
            float x[V];
            Elements<T>::unpack(load_pack_coherent(from + first * int64_t(sizeof(T))), x);
#pragma unroll
            for (int j = 0; j < V; ++j) x[j] *= factors[j];
            store_pack(to + first * int64_t(sizeof(T)), Elements<T>::pack(x));
            continue;
        }
#pragma unroll
        for (int j = 0; j < V; ++j)
            if (first + j < elements)
                store_element(to, first + j, args.dtype, load_element(from, first + j, args.dtype) * factors[j]);
    }
}

}  // namespace camkd::cuda
