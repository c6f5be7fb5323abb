// Converts the arguments from Python to the structs of ops.h, for the CPU and the CUDA functions: addresses are
// integers, matrices and shapes tuples.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstddef>
#include <iterator>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../ops.h"

namespace camkd::arguments {

using MatrixTuple = std::tuple<uintptr_t, int64_t, int64_t, int>;  // address, outer and inner row stride, dtype code
using Shape = std::tuple<int64_t, int64_t, int64_t>;               // N, C, S of Matrix
using Weights = std::tuple<uintptr_t, int64_t, int64_t>;           // address and strides of (K, N) weights, or zeros
using Second = std::tuple<uintptr_t, uintptr_t>;                   // addresses of SecondLabels, or zeros
using ShardTuple = std::tuple<int, uintptr_t>;                     // code of Shard, address of the sums or 0
using MapTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int>;  // address, strides of n, p and q, dtype code
using MapPair = std::tuple<std::tuple<int64_t, int64_t>, MapTuple, MapTuple>;  // (P, Q), student, teacher

template <class T>
inline T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

inline Matrix matrix(const MatrixTuple& m) {
    return {pointer<const void>(std::get<0>(m)), std::get<1>(m), std::get<2>(m), static_cast<DType>(std::get<3>(m))};
}

inline FeatureMap feature_map(const MapTuple& m) {
    return {pointer<const void>(std::get<0>(m)), std::get<1>(m), std::get<2>(m), std::get<3>(m),
            static_cast<DType>(std::get<4>(m))};
}

inline int fill(const std::vector<MatrixTuple>& from, Matrix* to, size_t most) {
    if (from.size() > most)
        throw std::invalid_argument("at most " + std::to_string(most) + " matrices, got " +
                                    std::to_string(from.size()));
    for (size_t k = 0; k < from.size(); ++k) to[k] = matrix(from[k]);
    return int(from.size());
}

// An int or a float, finite, and no subclass (a bool, a tensor).
inline bool read_number(PyObject* object, double& out) {
    if (!PyFloat_CheckExact(object) && !PyLong_CheckExact(object)) return false;
    out = PyFloat_AsDouble(object);
    if (PyErr_Occurred()) PyErr_Clear(), out = NAN;
    return std::isfinite(out);
}

inline bool read_integer(PyObject* object, int64_t& out) {
    if (!PyLong_CheckExact(object)) return false;
    int overflow = 0;
    out = PyLong_AsLongLongAndOverflow(object, &overflow);
    return overflow == 0;
}

// A weighting's name; `given` for anything that is not a string.
inline bool read_weighting(PyObject* object, Weighting& out) {
    out = Weighting::given;
    if (!PyUnicode_CheckExact(object)) return true;
    for (int code = 0; code < int(Weighting::given); ++code) {
        if (PyUnicode_CompareWithASCIIString(object, kWeightingNames[code]) != 0) continue;
        out = static_cast<Weighting>(code);
        return true;
    }
    return false;
}

// The items of a tuple or a list and their number; false for anything else.
inline bool read_items(PyObject* object, PyObject**& items, Py_ssize_t& count) {
    if (!PyTuple_Check(object) && !PyList_Check(object)) return false;
    items = PySequence_Fast_ITEMS(object), count = PySequence_Fast_GET_SIZE(object);
    return true;
}

// A divergence: the name of one without a mixture, or a pair of name and mixture share.
inline bool read_divergence(PyObject* object, Formula& out) {
    PyObject **pair = nullptr, *name = object;
    Py_ssize_t count;
    double share = 0;
    if (read_items(object, pair, count)) {
        if (count != 2 || !read_number(pair[1], share)) return false;
        name = pair[0];
    }
    if (!PyUnicode_CheckExact(name)) return false;
    out.mixture_share = float(share), out.mixture_other = float(1 - share);
    for (int code = 0; code < int(std::size(kDivergenceNames)); ++code) {
        if (PyUnicode_CompareWithASCIIString(name, kDivergenceNames[code]) != 0) continue;
        out.divergence = static_cast<Divergence>(code);
        return code < int(Divergence::jsd) ? share == 0 : share > 0 && share < 1;
    }
    return false;
}

// A positive number, or None for the value that stands for it.
inline bool read_positive(PyObject* object, float none, float& out) {
    double value;
    out = none;
    if (object == Py_None) return true;
    if (!read_number(object, value) || value <= 0) return false;
    out = float(value);
    return true;
}

// One positive number per teacher, or None for all of them.
inline bool read_per_teacher(PyObject* object, float none, float LogitMap::* field, Formula& out) {
    if (object == Py_None) return true;
    PyObject** numbers;
    Py_ssize_t count;
    if (!read_items(object, numbers, count) || count == 0 || count > kMaxTeachers) return false;
    if (out.teachers_maps != 0 && out.teachers_maps != count) return false;
    out.maps = true, out.teachers_maps = int(count);
    for (int k = 0; k < int(count); ++k)
        if (!read_positive(numbers[k], none, out.logit_maps[k + 1].*field)) return false;
    return true;
}

// Fields of camkd_fast.losses.formula.Formula in order; Python asserts the same names.
constexpr const char* kFormulaFields[] = {
    "temperature",          "hard_weight",      "soft_weight",   "weighting",           "ignore_index",
    "divergence",           "scale_by_t2",      "z_loss_weight", "student_logit_scale", "student_softcap",
    "teacher_logit_scales", "teacher_softcaps", "entropy"};

// The only place that reads a camkd_fast.losses.formula.Formula, a tuple. False if a field is invalid; no error is set.
inline bool read_formula(PyObject* from, Formula& out) {
    if (!PyTuple_Check(from) || PyTuple_GET_SIZE(from) != Py_ssize_t(std::size(kFormulaFields))) return false;
    auto next = [from, i = 0]() mutable { return PyTuple_GET_ITEM(from, i++); };
    auto read_flag = [](PyObject* object, bool& flag) {
        flag = object == Py_True;
        return flag || object == Py_False;
    };
    double numbers[3], z_loss_weight;
    for (double& number : numbers)
        if (!read_number(next(), number)) return false;
    out.temperature = float(numbers[0]), out.hard_weight = float(numbers[1]), out.soft_weight = float(numbers[2]);
    if (!(numbers[0] > 0) || !read_weighting(next(), out.weighting) || !read_integer(next(), out.ignore_index))
        return false;
    if (!read_divergence(next(), out) || !read_flag(next(), out.scale_by_t2)) return false;
    if (!read_number(next(), z_loss_weight)) return false;
    out.z_loss_weight = float(z_loss_weight);
    LogitMap& student = out.logit_maps[0];
    if (!read_positive(next(), 1, student.scale) || !read_positive(next(), 0, student.softcap)) return false;
    out.maps = student.scale != 1 || student.softcap != 0, out.teachers_maps = 0;
    return read_per_teacher(next(), 1, &LogitMap::scale, out) && read_per_teacher(next(), 0, &LogitMap::softcap, out) &&
           read_flag(next(), out.entropy);
}

// Whether the maps of a Formula are those of K teachers.
inline bool fits(const Formula& formula, int K) {
    return formula.teachers_maps == 0 || formula.teachers_maps == K;
}

inline SecondLabels second_labels(const Second& second) {
    return {pointer<const int64_t>(std::get<0>(second)), pointer<const float>(std::get<1>(second))};
}

inline RowLossArgs row_loss_args(const Shape& shape, const std::vector<MatrixTuple>& streams, uintptr_t target,
                                 const Second& second, const pybind11::object& formula, const Weights& weights,
                                 uintptr_t row_stats, uintptr_t grad_student, float grad_scale,
                                 const ShardTuple& shard) {
    RowLossArgs args{};
    std::tie(args.N, args.C, args.S) = shape;
    args.K = fill(streams, args.streams, kMaxStreams) - 1;
    args.target = pointer<const int64_t>(target);
    args.second = second_labels(second);
    if (!read_formula(formula.ptr(), args.formula) || !fits(args.formula, args.K))
        throw std::invalid_argument("not a checked Formula");
    args.weights = pointer<const float>(std::get<0>(weights));
    args.weight_stride_k = std::get<1>(weights);
    args.weight_stride_n = std::get<2>(weights);
    args.row_stats = pointer<float>(row_stats);
    args.grad_student = pointer<void>(grad_student);
    args.grad_scale = grad_scale;
    args.shard = static_cast<Shard>(std::get<0>(shard));
    args.sums = pointer<float>(std::get<1>(shard));
    return args;
}

inline ScaleRowsArgs scale_rows_args(int64_t N, int64_t C, uintptr_t grad, uintptr_t out, int dtype, uintptr_t factor,
                                     int64_t factor_stride) {
    return {N,
            C,
            pointer<const void>(grad),
            pointer<void>(out),
            static_cast<DType>(dtype),
            pointer<const float>(factor),
            factor_stride};
}

inline ConfidenceArgs confidence_args(const Shape& shape, const std::vector<MatrixTuple>& logits, uintptr_t target,
                                      const Second& second) {
    ConfidenceArgs args{};
    std::tie(args.N, args.C, args.S) = shape;
    args.K = fill(logits, args.logits, kMaxTeachers);
    args.target = pointer<const int64_t>(target);
    args.second = second_labels(second);
    return args;
}

inline ConfidenceArgs confidence_forward_args(const Shape& shape, const std::vector<MatrixTuple>& logits,
                                              uintptr_t target, const Second& second, int64_t ignore_index,
                                              uintptr_t weights, uintptr_t ce, uintptr_t lse) {
    ConfidenceArgs args = confidence_args(shape, logits, target, second);
    args.ignore_index = ignore_index;
    args.weights = pointer<float>(weights);
    args.ce = pointer<float>(ce);
    args.lse = pointer<float>(lse);
    return args;
}

inline ConfidenceArgs confidence_backward_args(const Shape& shape, const std::vector<MatrixTuple>& logits,
                                               uintptr_t target, const Second& second, uintptr_t lse, uintptr_t grad_ce,
                                               const std::vector<uintptr_t>& grads) {
    ConfidenceArgs args = confidence_args(shape, logits, target, second);
    args.ignore_index = -1;  // ignored rows have gradient 0, whatever their labels are
    args.lse = pointer<float>(lse);
    args.grad_ce = pointer<const float>(grad_ce);
    for (int k = 0; k < args.K; ++k) args.grads[k] = pointer<void>(grads.at(k));
    return args;
}

// `weights` may be 0, and so may `error`, `loss` and the gradients, which are not written then.
inline FeatureArgs feature_args(int64_t N, const std::vector<MapPair>& pairs, const Weights& weights, uintptr_t error,
                                uintptr_t loss, const std::vector<uintptr_t>& grads, float scale, float grad_scale) {
    FeatureArgs args{};
    if (pairs.size() > kMaxTeachers)
        throw std::invalid_argument("at most " + std::to_string(kMaxTeachers) + " pairs, got " +
                                    std::to_string(pairs.size()));
    args.N = N;
    args.K = int(pairs.size());
    for (int k = 0; k < args.K; ++k) {
        std::tie(args.P[k], args.Q[k]) = std::get<0>(pairs[k]);
        args.student[k] = feature_map(std::get<1>(pairs[k]));
        args.teacher[k] = feature_map(std::get<2>(pairs[k]));
        args.grads[k] = grads.empty() ? nullptr : pointer<void>(grads.at(k));
    }
    args.weights = pointer<const float>(std::get<0>(weights));
    args.weight_stride_k = std::get<1>(weights);
    args.weight_stride_n = std::get<2>(weights);
    args.error = pointer<float>(error);
    args.loss = pointer<float>(loss);
    args.scale = scale;
    args.grad_scale = grad_scale;
    return args;
}

}  // namespace camkd::arguments
