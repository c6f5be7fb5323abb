// A call of the logit loss by tensors, read in one crossing from Python. In Python, checks, allocations and reductions
// cost as much as the kernel at C = 100, and several times that after other work, when their code has left the cache.
#pragma once

#include <pybind11/pybind11.h>

#include "../ops.h"
#include "dlpack.h"

namespace camkd::python {

enum class Reduction { mean, sum, none };

// The arguments by position; `device_options` is the first of the device's own.
enum Argument { student, teachers, target, formula, reduction, num_items, loss_scale, grad_enabled, device_options };

// The arguments of a call, and references that keep its tensors alive.
struct __attribute__((visibility("hidden"))) LogitCall {
    RowLossArgs args{};             // but the outputs and the factors of the gradient
    dlpack::Tensor logits, labels;  // the student's logits
    Reduction reduced = Reduction::mean;
    bool counts = false;              // the loss is divided by the number of labels that are not ignored, or else ...
    double inverse = 1;               // ... multiplied by this
    double scale = 1;                 // factor of the gradient: a number, or ...
    const float* scale_at = nullptr;  // ... one element on the device of the tensors
    bool wants_grad = false;

    // False for anything that the general path, in Python, handles or refuses.
    bool read(PyObject* const* from);

  private:
    bool read_student(PyObject* object);
    bool read_teachers(PyObject* sequence);
    bool read_labels(PyObject* object);
    bool read_reduction(PyObject* name, PyObject* items);
    bool read_scale(PyObject* object);
    bool look_beside_student(PyObject* object, dlpack::Tensor& out) const;

    pybind11::object held_[kMaxTeachers];
};

}  // namespace camkd::python
