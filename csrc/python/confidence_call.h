// The logits and labels of the confidence weights, read from tensors.
#pragma once

#include "readers.h"

namespace camkd::python {

struct __attribute__((visibility("hidden"))) ConfidenceCall {
    ConfidenceArgs args{};  // but the outputs
    dlpack::Tensor labels;
    dlpack::Tensor logits[kMaxTeachers];
    bool requires_grad = false;  // does one of the logits?

    // False for anything that the general path, in Python, handles or refuses.
    bool read(PyObject* logits, PyObject* target, PyObject* second, PyObject* ignore_index);

    const dlpack::Device& device() const { return labels.device; }

  private:
    Items items_;
};

}  // namespace camkd::python
