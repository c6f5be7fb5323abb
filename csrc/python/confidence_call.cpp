#include "confidence_call.h"

#include "arguments.h"
#include "tensors.h"

namespace camkd::python {

bool ConfidenceCall::read(PyObject* sequence, PyObject* target, PyObject* second, PyObject* ignore_index) {
    if (!items_.read(sequence) || !arguments::read_integer(ignore_index, args.ignore_index)) return false;
    args.K = items_.count();
    for (int k = 0; k < args.K; ++k) {
        dlpack::Tensor& z = logits[k];
        if (!tensors::look(items_[k], z)) return false;
        if (k == 0 && !read_sizes(z, args.N, args.C, args.S)) return false;
        if (!(z.device == logits[0].device) || z.dimensions != logits[0].dimensions ||
            !same_shape(z, logits[0], z.dimensions) || !matrix_of(z, args.logits[k]))
            return false;
        requires_grad = requires_grad || tensors::requires_grad(items_[k]);
    }
    if (!read_labels(target, logits[0], labels)) return false;
    args.target = static_cast<const int64_t*>(tensors::address(labels));
    return read_second(second, labels, args.second);
}

}  // namespace camkd::python
