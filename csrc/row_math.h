// The per-row formulas, once, for every compiled kernel (host and device): online merge of column blocks, confidence
// weights, the loss of a row and the coefficients of its residual. Derivations: camkd_fast/reference.py.
//
// Exponentials and logarithms of K-sized arrays come from a `Math` policy (`Math::exp(x, n)`, `Math::log(x, n)`, both
// in place), so that a CPU kernel does all of a row's in one vector; the arrays are padded to whole vectors for it.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define CAMKD_HD __host__ __device__ inline
#else
// Internal linkage: each instruction set compiles its own copy, and the linker must not pick one for all.
#define CAMKD_HD static inline
#endif

namespace camkd {

constexpr int kMaxTeachers = 16;  // also a multiple of every vector width

enum class Weighting : int { confidence = 0, uniform = 1, entropy = 2, given = 3 };

struct Formula {
    float temperature;
    float hard_weight;
    float soft_weight;
    Weighting weighting;
};

// Sums over the columns seen so far, relative to `max`; while no finite logit was seen, `max` is -inf and all are 0.
template <class Real>
struct StreamState {
    float max = -INFINITY;
    Real sum_t = 0;    // sum e^{(x - max) / T}
    Real sum_1 = 0;    // sum e^{x - max}
    Real cross = 0;    // teachers: sum e^{(z - max_z) / T} ((z - max_z) - (s - max_s))
    Real entropy = 0;  // teachers: sum e^{z - max} (z - max)
};

// The factor that takes e^{(x - old_max) * inverse_t} to e^{(x - new_max) * inverse_t}.
template <class Real>
CAMKD_HD Real shift_factor(float old_max, float new_max, Real inverse_t) {
    if (old_max == new_max) return Real(1);
    return old_max == -INFINITY ? Real(0) : std::exp((Real(old_max) - Real(new_max)) * inverse_t);
}

template <class Real>
CAMKD_HD void move_student(StreamState<Real>& student, float new_max, Real inverse_t) {
    if (student.max == new_max) return;
    student.sum_t *= shift_factor(student.max, new_max, inverse_t);
    student.sum_1 *= shift_factor(student.max, new_max, Real(1));
    student.max = new_max;
}

// A teacher's `cross` also depends on the student's maximum, which has just gone from `old_student` to `new_student`.
template <class Real>
CAMKD_HD void move_teacher(StreamState<Real>& teacher, float new_max, float old_student, float new_student,
                           Real inverse_t) {
    if (teacher.max == -INFINITY) {
        teacher.max = new_max;
        return;
    }
    Real shift = Real(new_max) - Real(teacher.max);
    Real student_shift = old_student == -INFINITY ? Real(0) : Real(new_student) - Real(old_student);
    teacher.cross -= (shift - student_shift) * teacher.sum_t;
    if (teacher.max == new_max) return;
    Real factor_t = shift_factor(teacher.max, new_max, inverse_t);
    Real factor_1 = shift_factor(teacher.max, new_max, Real(1));
    // Columns whose probability underflows to 0 count 0, even where the student is -inf and their term infinite.
    teacher.cross = factor_t > 0 ? factor_t * teacher.cross : Real(0);
    teacher.entropy = factor_1 * (teacher.entropy - shift * teacher.sum_1);
    teacher.sum_t *= factor_t;
    teacher.sum_1 *= factor_1;
    teacher.max = new_max;
}

// Adds the sums of other columns of the same row, student first then K teachers; `b` is left at the common references.
template <class Real>
CAMKD_HD void merge_states(StreamState<Real>* a, StreamState<Real>* b, int K, Real inverse_t) {
    const float student_a = a[0].max, student_b = b[0].max;
    const float student = student_a > student_b ? student_a : student_b;
    for (int k = 0; k <= K; ++k) {
        const float max = a[k].max > b[k].max ? a[k].max : b[k].max;
        if (k == 0) {
            move_student(a[k], max, inverse_t);
            move_student(b[k], max, inverse_t);
        } else {
            move_teacher(a[k], max, student_a, student, inverse_t);
            move_teacher(b[k], max, student_b, student, inverse_t);
        }
        a[k].sum_t += b[k].sum_t;
        a[k].sum_1 += b[k].sum_1;
        a[k].cross += b[k].cross;
        a[k].entropy += b[k].entropy;
    }
}

CAMKD_HD float product_or_zero(float weight, float term) {
    return weight == 0 ? 0.0f : weight * term;
}

// w_k = (1 - softmax_k(CE)) / (K - 1), infinite CE sharing the softmax mass equally.
template <class Math>
CAMKD_HD void confidence_weights(const float* ce, int K, float* w) {
    float top = -INFINITY;
    for (int k = 0; k < K; ++k) top = ce[k] > top ? ce[k] : top;
    float share[kMaxTeachers];
    float sum = 0;
    for (int k = 0; k < K; ++k) share[k] = ce[k] == top ? 0.0f : ce[k] - top;
    Math::exp(share, K);
    for (int k = 0; k < K; ++k) sum += share[k];
    const float inverse = K == 1 ? 1.0f : 1.0f / (sum * float(K - 1));
    for (int k = 0; k < K; ++k) {
        // The sum of the others rather than 1 - softmax_k: exact for a teacher that is by far the worst.
        float others = K == 1 ? 1.0f : 0.0f;
        for (int j = 0; j < k; ++j) others += share[j];
        for (int j = k + 1; j < K; ++j) others += share[j];
        w[k] = others * inverse;
    }
}

// w_k = 1 - H_k / sum_j H_j.
CAMKD_HD void entropy_weights(const float* entropy, int K, float* w) {
    float sum = 0;
    for (int k = 0; k < K; ++k) sum += entropy[k];
    for (int k = 0; k < K; ++k)
        w[k] = K == 1 ? 1.0f : 1.0f - (sum > 0 ? entropy[k] / sum : (sum == 0 ? 1.0f / K : sum));
}

struct RowResult {
    float loss, hard, soft;
    float divergence[kMaxTeachers];
    float teacher_ce[kMaxTeachers];
    float weights[kMaxTeachers];
};

// residual_c = student_t e^{(s - max) / T} + student_1 e^{s - max} - sum_k teacher_k e^{(z_k - max_k) / T} - label [c =
// y]
struct ResidualCoefficients {
    float student_t, student_1, label;
    float teacher[kMaxTeachers];
};

// Everything of a row that is not C wide. `student_label` and `teacher_label` are the logits at the label (NaN for a
// label outside [0, C)); `result.weights` holds the weights on entry when they are given.
template <class Math, class Real>
CAMKD_HD void finish_row(const Formula& formula, int K, const StreamState<Real>& student,
                         const StreamState<Real>* teachers, float student_label, const float* teacher_label,
                         float residual_scale, RowResult& result, ResidualCoefficients& coefficients) {
    const float T = formula.temperature;
    float logs[3 * kMaxTeachers];
    logs[0] = float(student.sum_1);
    for (int k = 0; k < K; ++k) {
        // One logarithm of the ratio: the difference of two would cancel where student and teacher agree.
        logs[1 + 2 * k] = float(student.sum_t / teachers[k].sum_t);
        logs[2 + 2 * k] = float(teachers[k].sum_1);
    }
    Math::log(logs, 2 * K + 1);

    float entropy[kMaxTeachers];
    for (int k = 0; k < K; ++k) {
        const StreamState<Real>& z = teachers[k];
        result.divergence[k] = float(z.cross / (z.sum_t * Real(T))) + logs[1 + 2 * k];
        result.teacher_ce[k] = logs[2 + 2 * k] - (teacher_label[k] - z.max);
        entropy[k] = logs[2 + 2 * k] - float(z.entropy / z.sum_1);
    }
    float* w = result.weights;
    if (formula.weighting == Weighting::confidence) {
        confidence_weights<Math>(result.teacher_ce, K, w);
    } else if (formula.weighting == Weighting::entropy) {
        entropy_weights(entropy, K, w);
    } else if (formula.weighting == Weighting::uniform) {
        for (int k = 0; k < K; ++k) w[k] = 1.0f / float(K);
    }

    float total = 0, soft = 0;
    for (int k = 0; k < K; ++k) {
        total += w[k];
        soft += product_or_zero(w[k], result.divergence[k]);
    }
    result.hard = logs[0] - (student_label - student.max);
    result.soft = T * T * soft;
    result.loss = product_or_zero(formula.hard_weight, result.hard) + product_or_zero(formula.soft_weight, result.soft);

    const float soft_scale = formula.soft_weight * T * residual_scale;
    // A label outside [0, C) makes the whole row NaN, whatever the weights are.
    const float unfit = student_label != student_label ? student_label : 0.0f;
    result.loss += unfit;
    coefficients.label = formula.hard_weight * residual_scale;
    coefficients.student_t = soft_scale * total / float(student.sum_t) + unfit;
    coefficients.student_1 = coefficients.label / float(student.sum_1);
    for (int k = 0; k < K; ++k) coefficients.teacher[k] = product_or_zero(w[k], soft_scale / float(teachers[k].sum_t));
}

}  // namespace camkd
