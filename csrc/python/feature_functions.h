// The feature loss and the confidence weights, each in one crossing from Python, for CPU and CUDA tensors. Input that a
// function does not take, or that is invalid, is declined with None; the general path, in Python, then handles it or
// raises. Signatures: camkd_fast/_C.pyi.
#pragma once

#include <algorithm>

#include "arguments.h"
#include "confidence_call.h"
#include "fast_function.h"
#include "feature_call.h"
#include "tensors.h"

namespace camkd::python {

inline pybind11::tuple tuple_of(const int64_t* values, int count) {
    pybind11::tuple out(count);
    for (int i = 0; i < count; ++i) out[i] = values[i];
    return out;
}

// A contiguous float32 tensor of the shape (K, ...), the rest being that of `like`.
inline bool look_rows(PyObject* object, int K, const dlpack::Tensor& like, const float*& data) {
    dlpack::Tensor tensor;
    if (!look_on(like.device, object, tensor) || !(tensor.dtype == dlpack::kFloat32) || !is_contiguous(tensor))
        return false;
    if (tensor.dimensions != like.dimensions + 1 || tensor.shape[0] != K) return false;
    for (int i = 0; i < like.dimensions; ++i)
        if (tensor.shape[i + 1] != like.shape[i]) return false;
    data = static_cast<const float*>(tensors::address(tensor));
    return true;
}

// `Target` is where the kernels run: its options from Python, its memory and its launches.
template <class Target>
struct FeatureFunctions {
    using Object = pybind11::object;

    // (logits, target, second, ignore_index, grad_enabled, options...)
    static PyObject* confidence_weights(PyObject*, PyObject* const* from, Py_ssize_t count) {
        constexpr int own = 5;
        if (!takes("confidence_weights", own + Target::kOptions, count)) return nullptr;
        return guarded([&]() -> PyObject* {
            Target target;
            ConfidenceCall call;
            ConfidenceArgs& args = call.args;
            int64_t valid;
            if (!call.read(from[0], from[1], from[2], from[3]) || !target.read(from + own, call.device()))
                Py_RETURN_NONE;
            if (args.C > Target::kColumns || !target.count(args, valid)) Py_RETURN_NONE;
            const bool wants_grad = from[4] == Py_True && call.requires_grad;
            const typename Target::Current current(call.device());
            int64_t shape[tensors::kMostDimensions] = {args.K};
            std::copy_n(call.labels.shape, call.labels.dimensions, shape + 1);
            const int64_t kept_shape[] = {wants_grad ? 2 : 1, args.K, args.N};
            Object weights = make(target, shape, call.labels.dimensions + 1, dlpack::kFloat32, args.weights);
            Object ce = make(target, shape, call.labels.dimensions + 1, dlpack::kFloat32, args.ce);
            Object kept = make(target, kept_shape, 3, dlpack::kFloat32, args.lse);
            if (wants_grad) args.weights_copy = args.lse + args.K * args.N;
            target.confidence_forward(args);
            if (!wants_grad) kept = pybind11::none();
            return Py_BuildValue("(NNN)", weights.release().ptr(), ce.release().ptr(), kept.release().ptr());
        });
    }

    // (logits, target, second, ignore_index, kept, grad_weights, grad_ce, options...)
    static PyObject* confidence_gradients(PyObject*, PyObject* const* from, Py_ssize_t count) {
        constexpr int own = 7;
        if (!takes("confidence_gradients", own + Target::kOptions, count)) return nullptr;
        return guarded([&]() -> PyObject* {
            Target target;
            ConfidenceCall call;
            ConfidenceArgs& args = call.args;
            if (!call.read(from[0], from[1], from[2], from[3]) || !target.read(from + own, call.device()))
                Py_RETURN_NONE;
            const int64_t kept_shape[] = {args.K, args.N};
            dlpack::Tensor rows = call.labels;
            rows.dimensions = 2;
            rows.shape = const_cast<int64_t*>(kept_shape);
            const float* kept;
            if (args.C > Target::kColumns || !look_rows(from[4], 2, rows, kept)) Py_RETURN_NONE;
            if (from[5] != Py_None && !look_rows(from[5], args.K, call.labels, args.grad_weights)) Py_RETURN_NONE;
            if (from[6] != Py_None && !look_rows(from[6], args.K, call.labels, args.grad_ce)) Py_RETURN_NONE;
            args.chained = true;
            args.lse = const_cast<float*>(kept);
            args.weights_copy = args.lse + args.K * args.N;
            const typename Target::Current current(call.device());
            pybind11::list grads(args.K);
            for (int k = 0; k < args.K; ++k) {
                const dlpack::Tensor& z = call.logits[k];
                grads[k] = make(target, z.shape, z.dimensions, z.dtype, args.grads[k]);
            }
            target.confidence_backward(args);
            return grads.release().ptr();
        });
    }

    // (student, teachers, weights, reduction, scale, grad_enabled, options...)
    static PyObject* whole_feature_loss(PyObject*, PyObject* const* from, Py_ssize_t count) {
        constexpr int own = 6;
        if (!takes("whole_feature_loss", own + Target::kOptions, count)) return nullptr;
        return guarded([&]() -> PyObject* {
            Target target;
            FeatureCall call;
            Factor scale;
            if (!call.read_maps(from[0], from[1]) || !target.read(from + own, call.device())) Py_RETURN_NONE;
            if (!fits(call) || !call.read_weights(from[2])) Py_RETURN_NONE;
            if (!read_scale(from[3], from[4], call, scale)) Py_RETURN_NONE;
            FeatureArgs& args = call.args;
            const bool grad = from[5] == Py_True, of_maps = grad && call.requires_grad;
            const bool of_weights = grad && tensors::requires_grad(from[2]);
            // 1 / (M N) of a gradient without a loss scale could underflow.
            if (args.student[0].dtype == DType::f16 && (of_maps || of_weights)) Py_RETURN_NONE;
            const typename Target::Current current(call.device());
            Object loss = make(target, nullptr, 0, dlpack::kFloat32, args.loss), error = pybind11::none();
            Object buffer = pybind11::none(), layouts = pybind11::none();
            const tensors::Memory errors = target.allocate(args.K * args.N + Target::kFeatureScratch, dlpack::kFloat32);
            args.error = reinterpret_cast<float*>(errors.data);
            if (of_weights) {
                const int64_t shape[] = {args.K, args.N}, strides[] = {args.N, 1};
                error = tensors::make_in(errors, shape, strides, 2, dlpack::kFloat32);
            }
            if (of_maps) {
                const int64_t shape[] = {1, call.begin_of(args.K)};
                char* data = nullptr;
                buffer = make(target, shape, 2, call.dtype(), data);
                pybind11::list all(args.K);
                for (int k = 0; k < args.K; ++k) {
                    const GradientLayout& layout = call.gradients[k];
                    const int64_t begin = call.begin_of(k);
                    args.grads[k] = data + begin * (call.dtype().bits / 8);
                    all[k] = pybind11::make_tuple(tuple_of(layout.shape, layout.dimensions),
                                                  tuple_of(layout.strides, layout.dimensions), begin);
                }
                layouts = std::move(all);
            }
            args.grad_scale = 1;
            target.set(scale, args.scale, args.scale_device);
            target.features(args);
            Object used =
                scale.address ? pybind11::reinterpret_borrow<Object>(from[4]) : pybind11::float_(scale.number);
            return Py_BuildValue("(NNNNN)", loss.release().ptr(), error.release().ptr(), buffer.release().ptr(),
                                 layouts.release().ptr(), used.release().ptr());
        });
    }

    // (buffer, error, grad_output, scale, retained, options...)
    static PyObject* feature_gradients(PyObject*, PyObject* const* from, Py_ssize_t count) {
        constexpr int own = 5;
        if (!takes("feature_gradients", own + Target::kOptions, count)) return nullptr;
        return guarded([&]() -> PyObject* {
            Target target;
            dlpack::Tensor factor;
            Factor scale;
            if (!tensors::look(from[2], factor) || factor.dimensions != 0 || !(factor.dtype == dlpack::kFloat32))
                Py_RETURN_NONE;
            if (!scale.read(from[3], factor.device) || !target.read(from + own, factor.device)) Py_RETURN_NONE;
            const auto* const by = static_cast<const float*>(tensors::address(factor));
            dlpack::Tensor buffer, error;
            if (from[0] != Py_None && !look_matrix(from[0], factor.device, buffer)) Py_RETURN_NONE;
            if (from[1] != Py_None && !look_matrix(from[1], factor.device, error)) Py_RETURN_NONE;
            const typename Target::Current current(factor.device);
            Object grads = pybind11::none(), grad_weights = pybind11::none();
            if (from[0] != Py_None) grads = scaled(target, from[0], buffer, by, Factor{}, from[4] != Py_True);
            if (from[1] != Py_None) grad_weights = scaled(target, from[1], error, by, scale, false);
            return Py_BuildValue("(NN)", grads.release().ptr(), grad_weights.release().ptr());
        });
    }

    // (student, teachers, logits, target, second, beta, reduction, num_items, ignore_index, loss_scale, options...)
    static PyObject* feature_loss_and_grad(PyObject*, PyObject* const* from, Py_ssize_t count) {
        constexpr int own = 10;
        if (!takes("feature_loss_and_grad", own + Target::kOptions, count)) return nullptr;
        return guarded([&]() -> PyObject* {
            Target target;
            FeatureCall call;
            ConfidenceCall of_weights;
            Divisor divisor;
            Factor loss_scale;
            FeatureArgs& args = call.args;
            ConfidenceArgs& confidence = of_weights.args;
            double beta;
            int64_t valid = 0;
            if (!call.read_maps(from[0], from[1]) || !target.read(from + own, call.device()) || !fits(call))
                Py_RETURN_NONE;
            if (!of_weights.read(from[2], from[3], from[4], from[8]) || !(of_weights.device() == call.device()) ||
                of_weights.labels.dimensions != 1 || confidence.N != args.N || confidence.K != args.K)
                Py_RETURN_NONE;
            if (!arguments::read_number(from[5], beta) || !divisor.read(from[6], from[7]) ||
                divisor.reduction == Reduction::none || !loss_scale.read(from[9], call.device()))
                Py_RETURN_NONE;
            if (confidence.C > Target::kColumns || !target.count(confidence, valid)) Py_RETURN_NONE;
            const typename Target::Current current(call.device());
            const int64_t shape[] = {args.K, args.N}, items = args.K * args.N;
            Object loss = make(target, nullptr, 0, dlpack::kFloat32, args.loss);
            Object weights = make(target, shape, 2, dlpack::kFloat32, confidence.weights);
            Object ce = make(target, shape, 2, dlpack::kFloat32, confidence.ce);
            pybind11::list grads(args.K);
            for (int k = 0; k < args.K; ++k) {
                const GradientLayout& layout = call.gradients[k];
                const tensors::Memory memory = target.allocate(layout.elements, call.dtype());
                args.grads[k] = memory.data;
                grads[k] = tensors::make_in(memory, layout.shape, layout.strides, layout.dimensions, call.dtype());
            }
            // Errors with the kernel's own numbers, log-sum-exps, and 1 / number of samples that are not ignored.
            const tensors::Memory scratch = target.allocate(2 * items + Target::kFeatureScratch + 1, dlpack::kFloat32);
            args.error = reinterpret_cast<float*>(scratch.data);
            confidence.lse = args.error + items + Target::kFeatureScratch;
            args.weights = confidence.weights;
            args.weight_stride_k = args.N;
            args.weight_stride_n = 1;
            Factor scale;
            scale.number = beta * (Target::kCounts ? divisor.inverse_of(valid) : divisor.inverse);
            if (divisor.counts && !Target::kCounts) {
                confidence.inverse_valid = confidence.lse + items;
                scale.address = confidence.inverse_valid;
            }
            target.set(scale, args.scale, args.scale_device);
            target.set(loss_scale, args.grad_scale, args.grad_scale_device);
            target.confidence_forward(confidence);
            target.features(args);
            return Py_BuildValue("(NNNN)", loss.release().ptr(), weights.release().ptr(), ce.release().ptr(),
                                 grads.release().ptr());
        });
    }

  private:
    template <class Data>
    static Object make(Target& target, const int64_t* shape, int dimensions, dlpack::DataType dtype, Data*& data) {
        void* address = nullptr;
        Object tensor = target.make(shape, dimensions, dtype, address);
        data = static_cast<Data*>(address);
        return tensor;
    }

    static bool fits(const FeatureCall& call) {
        for (int k = 0; k < call.args.K; ++k)
            if (values_of(call.args, k) > Target::kColumns) return false;
        return true;
    }

    // A scale, or for None that of the reduction.
    static bool read_scale(PyObject* reduction, PyObject* given, const FeatureCall& call, Factor& out) {
        Divisor divisor;
        if (!divisor.read(reduction, Py_None) || divisor.reduction == Reduction::none) return false;
        if (given != Py_None) return out.read(given, call.device());
        out.number = divisor.reduction == Reduction::mean ? 1.0 / double(call.args.N) : 1.0;
        return true;
    }

    static bool look_matrix(PyObject* object, const dlpack::Device& device, dlpack::Tensor& out) {
        DType code;
        return look_on(device, object, out) && out.dimensions == 2 && is_contiguous(out) &&
               tensors::dtype_of(out, code);
    }

    // `from` times a factor on the device and another one: in place, or a new tensor.
    static Object scaled(Target& target, PyObject* object, const dlpack::Tensor& from, const float* factor,
                         const Factor& other, bool in_place) {
        ScaleRowsArgs args{};
        tensors::dtype_of(from, args.dtype);
        args.N = from.shape[0];
        args.C = from.shape[1];
        args.grad = args.out = tensors::address(from);
        args.factor = factor;
        args.number = float(other.number);
        Object out = pybind11::reinterpret_borrow<Object>(object);
        if (!in_place) out = make(target, from.shape, 2, from.dtype, args.out);
        target.scale_rows(args);
        if (other.address) {
            args.grad = args.out;
            args.factor = other.address;
            target.scale_rows(args);
        }
        return out;
    }
};

}  // namespace camkd::python
