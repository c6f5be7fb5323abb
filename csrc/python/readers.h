// Readers of arguments that the logit loss and the feature loss share. Each is false for anything that the general
// path, in Python, handles or refuses.
#pragma once

#include <pybind11/pybind11.h>

#include "../ops.h"
#include "dlpack.h"

namespace camkd::python {

enum class Reduction { mean, sum, none };

// What a sum is multiplied by.
struct Divisor {
    Reduction reduction = Reduction::mean;
    bool counts = false;  // 1 / number of labels that are not ignored (at least 1), or else ...
    double inverse = 1;   // ... this number

    bool read(PyObject* name, PyObject* num_items);

    double inverse_of(int64_t valid) const { return counts ? 1.0 / double(valid > 0 ? valid : 1) : inverse; }
};

// A number, or one float32 element on a device.
struct Factor {
    double number = 1;
    const float* address = nullptr;

    bool read(PyObject* object, const dlpack::Device& device);

    double on_host() const { return address ? double(*address) : number; }
};

// A list or tuple of 1 to kMaxTeachers objects, which live as long as this.
class __attribute__((visibility("hidden"))) Items {
  public:
    bool read(PyObject* sequence);
    int count() const { return count_; }
    PyObject* operator[](int k) const { return held_[k].ptr(); }

  private:
    int count_ = 0;
    pybind11::object held_[kMaxTeachers];
};

bool same_shape(const dlpack::Tensor& a, const dlpack::Tensor& b, int dimensions);
bool is_contiguous(const dlpack::Tensor& tensor);

// (N, C) or (B, S, C) logits with unit column stride.
bool matrix_of(const dlpack::Tensor& logits, Matrix& out);

// Sizes of (N, C) or (B, S, C) logits, none of them 0.
bool read_sizes(const dlpack::Tensor& logits, int64_t& N, int64_t& C, int64_t& S);

bool look_on(const dlpack::Device& device, PyObject* object, dlpack::Tensor& out);

// Contiguous int64 labels in the leading shape of these logits, and on their device.
bool read_labels(PyObject* object, const dlpack::Tensor& logits, dlpack::Tensor& out);

// A pair of contiguous second labels and their float32 shares, like these labels; or None for no second labels.
bool read_second(PyObject* object, const dlpack::Tensor& labels, SecondLabels& out);

}  // namespace camkd::python
