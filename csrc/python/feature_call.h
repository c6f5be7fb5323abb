// K pairs of feature maps, read from tensors, and how their gradients lie in memory:
// camkd_fast/backends/feature_maps.py in C++. Maps that two strides do not describe are left to Python, which copies
// them.
#pragma once

#include "readers.h"
#include "tensors.h"

namespace camkd::python {

// The gradient of one map, in the memory order of the student's.
struct GradientLayout {
    int dimensions;
    const int64_t* shape;  // of the student's map
    int64_t strides[tensors::kMostDimensions];
    int64_t elements;
};

struct __attribute__((visibility("hidden"))) FeatureCall {
    FeatureArgs args{};  // but the outputs
    dlpack::Tensor student[kMaxTeachers], weights;
    GradientLayout gradients[kMaxTeachers];
    bool requires_grad = false;  // does one of the student's maps?

    // False for anything that the general path, in Python, handles or refuses.
    bool read_maps(PyObject* student, PyObject* teachers);
    bool read_weights(PyObject* object);  // (K, N) float32 of any strides; after the maps

    const dlpack::Device& device() const { return student[0].device; }
    dlpack::DataType dtype() const { return student[0].dtype; }

    // Where the gradient of map k begins if all gradients share memory, in elements; for K the size of that memory.
    int64_t begin_of(int k) const;

  private:
    bool read_pair(int k, const dlpack::Tensor& r, const dlpack::Tensor& f);

    Items students_, teachers_;
};

}  // namespace camkd::python
