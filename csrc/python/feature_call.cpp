#include "feature_call.h"

#include <algorithm>

namespace camkd::python {
namespace {

constexpr int64_t kAlignment = 32;  // elements, as in feature_maps.py

// Dimensions of a sample from the outermost to the innermost, without those of size 1.
struct Order {
    int count = 0, at[tensors::kMostDimensions];
};

// Memory order if each sample fills a range of memory (`dense`), or else the order of the dimensions.
Order order_of(const dlpack::Tensor& map, bool& dense) {
    Order natural, sorted;
    for (int d = 1; d < map.dimensions; ++d)
        if (map.shape[d] != 1) natural.at[natural.count++] = d;
    sorted = natural;
    std::stable_sort(sorted.at, sorted.at + sorted.count,
                     [&](int a, int b) { return map.strides[a] > map.strides[b]; });
    int64_t expected = 1;
    dense = true;
    for (int i = sorted.count - 1; i >= 0; --i) {
        dense = dense && map.strides[sorted.at[i]] == expected;
        expected *= map.shape[sorted.at[i]];
    }
    return dense ? sorted : natural;
}

void set_gradient(const dlpack::Tensor& r, bool dense, GradientLayout& out) {
    out.dimensions = r.dimensions;
    out.shape = r.shape;
    const bool contiguous = is_contiguous(r);
    int64_t stride = 1;
    for (int d = r.dimensions - 1; d >= 0; stride *= r.shape[d--])
        out.strides[d] = contiguous || (dense && d > 0) ? r.strides[d] : stride;
    out.elements = stride;
}

}  // namespace

bool FeatureCall::read_maps(PyObject* student_maps, PyObject* teacher_maps) {
    if (!students_.read(student_maps) || !teachers_.read(teacher_maps)) return false;
    args.K = students_.count();
    if (teachers_.count() != args.K) return false;
    for (int k = 0; k < args.K; ++k) {
        dlpack::Tensor& r = student[k];
        dlpack::Tensor f;
        if (!tensors::look(students_[k], r) || !look_on(student[0].device, teachers_[k], f)) return false;
        if (!(r.device == student[0].device) || !(r.dtype == student[0].dtype) || r.dimensions < 2 ||
            r.dimensions > tensors::kMostDimensions || r.shape[0] != student[0].shape[0])
            return false;
        if (f.dimensions != r.dimensions || !same_shape(f, r, r.dimensions) || !read_pair(k, r, f)) return false;
        if (tensors::requires_grad(teachers_[k])) return false;
        requires_grad = requires_grad || tensors::requires_grad(students_[k]);
    }
    args.N = student[0].shape[0];
    return true;
}

bool FeatureCall::read_pair(int k, const dlpack::Tensor& r, const dlpack::Tensor& f) {
    FeatureMap &mine = args.student[k], &theirs = args.teacher[k];
    if (!tensors::dtype_of(r, mine.dtype) || !tensors::dtype_of(f, theirs.dtype)) return false;
    mine.data = tensors::address(r);
    theirs.data = tensors::address(f);
    mine.stride_n = r.strides[0];
    theirs.stride_n = f.strides[0];
    bool dense;
    const Order order = order_of(r, dense);
    set_gradient(r, dense, gradients[k]);
    // Merge the dimensions that continue each other in both maps.
    int64_t sizes[2] = {1, 1}, of_r[2] = {0, 1}, of_f[2] = {0, 1};
    int count = 0;
    for (int i = 0; i < order.count; ++i) {
        const int d = order.at[i];
        const int64_t size = r.shape[d];
        if (size == 0) return false;
        if (count > 0 && of_r[count - 1] == size * r.strides[d] && of_f[count - 1] == size * f.strides[d])
            sizes[--count] *= size;
        else if (count < 2)
            sizes[count] = size;
        else
            return false;
        of_r[count] = r.strides[d];
        of_f[count++] = f.strides[d];
    }
    const int q = count == 2 ? 1 : 0;  // a single dimension is Q
    args.P[k] = count == 2 ? sizes[0] : 1;
    args.Q[k] = count == 0 ? 1 : sizes[q];
    mine.stride_p = count == 2 ? of_r[0] : 0;
    theirs.stride_p = count == 2 ? of_f[0] : 0;
    mine.stride_q = count == 0 ? 1 : of_r[q];
    theirs.stride_q = count == 0 ? 1 : of_f[q];
    return r.shape[0] > 0;
}

bool FeatureCall::read_weights(PyObject* object) {
    if (!look_on(device(), object, weights) || !(weights.dtype == dlpack::kFloat32)) return false;
    if (weights.dimensions != 2 || weights.shape[0] != args.K || weights.shape[1] != args.N) return false;
    args.weights = static_cast<const float*>(tensors::address(weights));
    args.weight_stride_k = weights.strides[0];
    args.weight_stride_n = weights.strides[1];
    return true;
}

int64_t FeatureCall::begin_of(int k) const {
    int64_t begin = 0;
    for (int i = 0; i < k; ++i) begin += (gradients[i].elements + kAlignment - 1) / kAlignment * kAlignment;
    return begin;
}

}  // namespace camkd::python
