#include "logit_call.h"

#include "arguments.h"
#include "tensors.h"

using namespace camkd::arguments;

namespace camkd::python {

bool LogitCall::read(PyObject* const* from) {
    if (!tensors::look(from[student], logits) || !read_sizes(logits, args.N, args.C, args.S)) return false;
    if (!matrix_of(logits, args.streams[0]) || !read_teachers(from[teachers])) return false;
    if (!read_labels(from[target], logits, labels)) return false;
    args.target = static_cast<const int64_t*>(tensors::address(labels));
    if (!read_second(from[second], labels, args.second)) return false;
    if (!read_formula(from[formula], args.formula) || args.formula.weighting == Weighting::given) return false;
    const bool finished = from[loss_scale] != Py_None;  // and not left to backward
    if (!divisor.read(from[reduction], from[num_items])) return false;
    if (finished && !scale.read(from[loss_scale], logits.device)) return false;
    // Divided by N in the kernel, gradients of float16 could underflow.
    if (args.streams[0].dtype == DType::f16 && divisor.reduction == Reduction::mean && !finished) return false;
    wants_grad = finished || (from[grad_enabled] == Py_True && tensors::requires_grad(from[student]));
    return fits(args.formula, args.K);
}

bool LogitCall::read_teachers(PyObject* sequence) {
    if (!teachers_.read(sequence)) return false;
    args.K = teachers_.count();
    for (int k = 0; k < args.K; ++k) {
        dlpack::Tensor theirs;
        if (!look_on(logits.device, teachers_[k], theirs) || theirs.dimensions != logits.dimensions ||
            !same_shape(theirs, logits, logits.dimensions) || !matrix_of(theirs, args.streams[k + 1]) ||
            tensors::requires_grad(teachers_[k]))
            return false;
    }
    return true;
}

}  // namespace camkd::python
