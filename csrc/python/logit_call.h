// A call of the logit loss by tensors, read in one crossing from Python. In Python, checks, allocations and reductions
// cost as much as the kernel at C = 100, and several times that after other work, when their code has left the cache.
#pragma once

#include "readers.h"

namespace camkd::python {

// The arguments by position; `device_options` is the first of the device's own.
enum Argument {
    student,
    teachers,
    target,
    second,
    formula,
    reduction,
    num_items,
    loss_scale,
    grad_enabled,
    device_options
};

// The arguments of a call, and references that keep its tensors alive.
struct __attribute__((visibility("hidden"))) LogitCall {
    RowLossArgs args{};             // but the outputs and the factors of the gradient
    dlpack::Tensor logits, labels;  // the student's logits
    Divisor divisor;
    Factor scale;  // of the gradient
    bool wants_grad = false;

    // False for anything that the general path, in Python, handles or refuses.
    bool read(PyObject* const* from);

  private:
    bool read_teachers(PyObject* sequence);

    Items teachers_;
};

// The result of a call: WholeLoss of camkd_fast/backends/whole_losses.py.
inline PyObject* whole_loss(const pybind11::object& loss, const pybind11::object& row_stats,
                            const pybind11::object& grad_student, const pybind11::object& sums,
                            const pybind11::object& means, const pybind11::object& inverse_divisor) {
    return PyTuple_Pack(6, loss.ptr(), row_stats.ptr(), grad_student.ptr(), sums.ptr(), means.ptr(),
                        inverse_divisor.ptr());
}

}  // namespace camkd::python
