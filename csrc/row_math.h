// The per-row formulas of the compiled kernels, on host and device: online merge of column blocks, teacher weights, the
// losses of a row and the coefficients of its gradient. Derivations: camkd_fast/backends/reference.py. The CUDA kernel
// has its own compute_weights and losses in csrc/cuda/row_loss/results.cuh, with a lane per teacher, because a row
// would wait too long for one thread.
//
// Formulas over the K teachers are written for a number `F`: a float, or a vector that holds one row per lane. Its
// `Math` policy supplies set(x), max(a, b) (b where one is NaN), exp(x), log(x), difference(a, b) (0 where a == b,
// infinities included), zero_where_zero(x, where) and where_positive(x, a, b) (a where x > 0 or x is NaN, else b).
//
// The sums of a stream have a struct for each level, on the way from columns to rows (csrc/cuda/row_loss/ ends with a
// StreamState of the whole row):
//
//   LaneSums            a block of columns, a sum per vector lane; LaneSums::reduced makes BlockSums of it
//   BlockSums           a block of columns; BlockSums::add_to adds it to a StreamState
//   StreamState         what a thread, warp or block has read of a row; merge_states and general_merge add them up
//   LaneRows::Stream    a whole row per vector lane; RowPasses::store_sums fills a lane from the row's StreamState, or
//                       from the BlockSums of its only block
//   RowSums             a whole row, or a vector of rows, for compute_weights; made of a Stream by
//                       LaneRows::write_row_stats, on CUDA of StreamStates by FormulaKernel::merge
#pragma once

#include <cmath>
#include <cstdint>

#include "contract.h"

namespace camkd {

// Sums over the columns so far, relative to `max`. Before the first finite logit `max` is -inf and all sums are 0.
template <class Real>
struct StreamState {
    float max = -INFINITY;
    Real sumT = 0;   // sum e^{(x - max) / T}
    Real sum1 = 0;   // sum e^{x - max}
    Real cross = 0;  // teachers: sum e^{(z - max_z) / T} ((z - max_z) - (s - max_s)), or for the reverse KL
                     // sum e^{(s - max_s) / T} ((s - max_s) - (z - max_z))
    Real plogp = 0;  // teachers: sum e^{z - max} (z - max); student: sum e^{(s - max) / T} (s - max)
};

// The factor from e^{(x - old_max) * inverseT} to e^{(x - new_max) * inverseT}.
template <class Real>
CAMKD_HD Real shift_factor(float old_max, float new_max, Real inverseT) {
    if (old_max == new_max) return Real(1);
    return old_max == -INFINITY ? Real(0) : std::exp((Real(old_max) - Real(new_max)) * inverseT);
}

template <class Real>
CAMKD_HD void move_student(StreamState<Real>& student, float new_max, Real inverseT) {
    if (student.max == new_max) return;
    student.sumT *= shift_factor(student.max, new_max, inverseT);
    student.sum1 *= shift_factor(student.max, new_max, Real(1));
    student.max = new_max;
}

// A teacher's `cross` also depends on the student's maximum, which has changed from `old_student` to `new_student`.
template <class Real>
CAMKD_HD void move_teacher(StreamState<Real>& teacher, float new_max, float old_student, float new_student,
                           Real inverseT) {
    if (teacher.max == -INFINITY) {
        teacher.max = new_max;
        return;
    }
    Real shift = Real(new_max) - Real(teacher.max);
    Real student_shift = old_student == -INFINITY ? Real(0) : Real(new_student) - Real(old_student);
    teacher.cross -= (shift - student_shift) * teacher.sumT;
    if (teacher.max == new_max) return;
    Real factorT = shift_factor(teacher.max, new_max, inverseT);
    Real factor1 = shift_factor(teacher.max, new_max, Real(1));
    // A column whose probability underflows to 0 counts 0, even if the student is -inf there and its term infinite.
    teacher.cross = factorT > 0 ? factorT * teacher.cross : Real(0);
    // A shift from the lowest float overflows when it is multiplied
    teacher.plogp = factor1 > 0 ? factor1 * (teacher.plogp - shift * teacher.sum1) : Real(0);
    teacher.sumT *= factorT;
    teacher.sum1 *= factor1;
    teacher.max = new_max;
}

// The student's `plogp`. Must come before move_student.
template <class Real>
CAMKD_HD void move_entropy(StreamState<Real>& student, float new_max, Real inverseT) {
    if (student.max == new_max || student.max == -INFINITY) return;
    const Real factor = shift_factor(student.max, new_max, inverseT);
    const Real shift = Real(new_max) - Real(student.max);
    // As in move_teacher, a shift from the lowest float may overflow
    student.plogp = factor > 0 ? factor * (student.plogp - shift * student.sumT) : Real(0);
}

// move_teacher for the reverse KL, whose `cross` depends on the student's old sums.
template <class Real>
CAMKD_HD void move_reverse(StreamState<Real>& teacher, float new_max, const StreamState<Real>& old_student,
                           float new_student, Real inverseT) {
    const Real own = teacher.max == -INFINITY ? Real(0) : Real(new_max) - Real(teacher.max);
    const Real students = old_student.max == -INFINITY ? Real(0) : Real(new_student) - Real(old_student.max);
    const Real factor = shift_factor(old_student.max, new_student, inverseT);
    const Real cross = factor > 0 ? factor * (teacher.cross + (own - students) * old_student.sumT) : Real(0);
    teacher.cross = 0;
    move_teacher(teacher, new_max, new_student, new_student, inverseT);
    teacher.cross = cross;
}

// Adds to `a` the sums `b` of other columns of the same row, student first, then K teachers. Moves `b` to the common
// maxima as well.
template <class Real>
CAMKD_HD void merge_states(StreamState<Real>* a, StreamState<Real>* b, int K, Real inverseT) {
    const float student_a = a[0].max, student_b = b[0].max;
    const float student = student_a > student_b ? student_a : student_b;
    for (int k = 0; k <= K; ++k) {
        const float max = a[k].max > b[k].max ? a[k].max : b[k].max;
        if (k == 0) {
            move_student(a[k], max, inverseT);
            move_student(b[k], max, inverseT);
        } else {
            move_teacher(a[k], max, student_a, student, inverseT);
            move_teacher(b[k], max, student_b, student, inverseT);
        }
        a[k].sumT += b[k].sumT;
        a[k].sum1 += b[k].sum1;
        a[k].cross += b[k].cross;
        a[k].plogp += b[k].plogp;
    }
}

// `Math` for one row at a time.
struct ScalarMath {
    CAMKD_HD_MEMBER float set(float x) { return x; }
    CAMKD_HD_MEMBER float max(float a, float b) { return a > b ? a : b; }
    CAMKD_HD_MEMBER float exp(float x) { return std::exp(x); }
    CAMKD_HD_MEMBER float log(float x) { return std::log(x); }
    CAMKD_HD_MEMBER float difference(float a, float b) { return a == b ? 0.0f : a - b; }
    CAMKD_HD_MEMBER float zero_where_zero(float x, float where) { return where == 0 ? 0.0f : x; }
    CAMKD_HD_MEMBER float where_positive(float x, float a, float b) { return x <= 0 ? b : a; }
};

template <class Math, class F>
CAMKD_HD F product_or_zero(F weight, F term) {
    return weight * Math::zero_where_zero(term, weight);
}

// Instead of sum - x[k], which would cancel for a teacher that has nearly all of it.
template <class Math, class F>
CAMKD_HD F sum_of_others(const F* x, int K, int k) {
    F others = Math::set(0.0f);
    for (int j = 0; j < K; ++j)
        if (j != k) others = others + x[j];
    return others;
}

// w_k = (1 - softmax_k(CE)) / (K - 1); teachers with infinite CE share the softmax mass equally. `scratch` holds K
// numbers, because an array inside this function would be local memory on a GPU.
template <class Math, class F>
CAMKD_HD void confidence_weights(const F* ce, int K, F* w, F* scratch) {
    if (K == 1) {
        w[0] = Math::set(1.0f);
        return;
    }
    F top = Math::set(-INFINITY), sum = Math::set(0.0f);
    for (int k = 0; k < K; ++k) top = Math::max(ce[k], top);
    for (int k = 0; k < K; ++k) {
        scratch[k] = Math::exp(Math::difference(ce[k], top));
        sum = sum + scratch[k];
    }
    const F inverse = Math::set(1.0f) / (sum * Math::set(float(K - 1)));
    for (int k = 0; k < K; ++k) w[k] = sum_of_others<Math>(scratch, K, k) * inverse;
}

// w_k = 1 - H_k / sum_j H_j.
template <class Math, class F>
CAMKD_HD void entropy_weights(const F* entropy, int K, F* w) {
    const F one = Math::set(1.0f), equal = Math::set(float(K - 1) / float(K));
    F sum = Math::set(0.0f);
    for (int k = 0; k < K; ++k) sum = sum + entropy[k];
    for (int k = 0; k < K; ++k)
        w[k] = K == 1 ? one : Math::where_positive(sum, sum_of_others<Math>(entropy, K, k) / sum, equal);
}

// w_k = 1 for the first of the lowest CE_k, 0 for the others; NaN if a CE_k is.
template <class Math, class F>
CAMKD_HD void lowest_weights(const F* ce, int K, F* w) {
    const F one = Math::set(1.0f), zero = Math::set(0.0f);
    F lowest = ce[0], sum = ce[0];
    for (int k = 1; k < K; ++k) {
        lowest = zero - Math::max(zero - ce[k], zero - lowest);
        sum = sum + ce[k];
    }
    const F nan = Math::difference(sum, sum);  // or 0
    F left = one;                              // 1 until a teacher has it
    for (int k = 0; k < K; ++k) {
        const F weight = Math::where_positive(Math::difference(ce[k], lowest), zero, left);
        left = left - weight;
        w[k] = weight + nan;
    }
}

template <class F>
struct RowResult {
    F loss, hard, soft, entropy;
    F divergence[kMaxTeachers];
    F teacher_ce[kMaxTeachers];
    F weights[kMaxTeachers];
    F scratch[kMaxTeachers];  // entropies, or softmax numerators over teachers
};

// Of the forward KL:
// grad_c = studentT e^{(s - max) / T} + student1 e^{s - max} - sum_k teacher_k e^{(z_k - max_k) / T}
//          - label_coefficient [c = y]    (times the share of the label)
// Of the others, with x_k = (s - max) - (z_k - max_k) for the reverse KL and g for jsd and skew:
// grad_c = studentT e^{(s - max) / T} sum_k teacher_k (x_k - center_k) + student1 ... as above
template <class F>
struct GradCoefficients {
    F studentT, student1;
    F teacher[kMaxTeachers], center[kMaxTeachers];
};

// soft_weight T, the factor of d(sum_k w_k D_k) / d(s / T), or without T^2 soft_weight / T.
CAMKD_HD float soft_grad_scale(const Formula& formula) {
    return formula.scale_by_t2 ? formula.soft_weight * formula.temperature : formula.soft_weight / formula.temperature;
}

CAMKD_HD float label_coefficient(const Formula& formula, float grad_scale) {
    return formula.hard_weight * grad_scale;
}

// log sum_c e^{s_c}.
template <class Math, class F>
CAMKD_HD F log_sum(const RowSums<F>& stream) {
    return stream.max + Math::log(stream.sum1);
}

// D of a teacher from the sums of the row.
template <class Math, class F>
CAMKD_HD F divergence_of(const Formula& formula, const RowSums<F>& student, const RowSums<F>& teacher) {
    const F T = Math::set(formula.temperature);
    // One logarithm of the ratio: the difference of two would cancel where student and teacher agree.
    if (formula.divergence == Divergence::forward_kl)
        return teacher.cross / (teacher.sumT * T) + Math::log(student.sumT / teacher.sumT);
    if (formula.divergence == Divergence::reverse_kl)
        return teacher.cross / (student.sumT * T) + Math::log(teacher.sumT / student.sumT);
    return teacher.cross;
}

// The part of a row's results that the gradient waits for: the teachers' cross-entropies and weights, and the
// coefficients. `label_nan` is NaN for invalid labels, else 0. Given weights are in `result.weights` on entry.
template <class Math, class F>
CAMKD_HD void compute_weights(const Formula& formula, int K, const RowSums<F>& student, const RowSums<F>* teachers,
                              F label_nan, float grad_scale, RowResult<F>& result, GradCoefficients<F>& coefficients) {
    const float T = formula.temperature;
    F* const entropy = result.scratch;
    for (int k = 0; k < K; ++k) {
        const RowSums<F>& z = teachers[k];
        const F log_sum1 = Math::log(z.sum1);
        result.teacher_ce[k] = log_sum1 - z.label;
        if (formula.weighting == Weighting::entropy) entropy[k] = log_sum1 - z.plogp / z.sum1;
    }
    F* w = result.weights;
    if (formula.weighting == Weighting::confidence) {
        confidence_weights<Math>(result.teacher_ce, K, w, result.scratch);
    } else if (formula.weighting == Weighting::entropy) {
        entropy_weights<Math>(entropy, K, w);
    } else if (formula.weighting == Weighting::min_ce) {
        lowest_weights<Math>(result.teacher_ce, K, w);
    } else if (formula.weighting == Weighting::uniform) {
        for (int k = 0; k < K; ++k) w[k] = Math::set(1.0f / float(K));
    }
    F total = Math::set(0.0f);
    for (int k = 0; k < K; ++k) total = total + w[k];

    F hard_scale = Math::set(label_coefficient(formula, grad_scale));
    if (formula.z_loss_weight != 0)
        hard_scale = hard_scale + Math::set(2 * formula.z_loss_weight * grad_scale) * log_sum<Math>(student);
    coefficients.student1 = hard_scale / student.sum1;
    const F soft_scale = Math::set(soft_grad_scale(formula) * grad_scale);
    const bool no_soft_term = formula.soft_weight == 0;  // whatever the teachers are
    const F zero = Math::set(0.0f);
    if (formula.divergence == Divergence::forward_kl) {
        coefficients.studentT = (no_soft_term ? zero : soft_scale * total / student.sumT) + label_nan;
        for (int k = 0; k < K; ++k)
            coefficients.teacher[k] = no_soft_term ? zero : product_or_zero<Math>(w[k], soft_scale / teachers[k].sumT);
        return;
    }
    const bool reverse = formula.divergence == Divergence::reverse_kl;
    const F inverse_sum = Math::set(1.0f) / student.sumT;
    F nan = label_nan;
    for (int k = 0; k < K; ++k) {
        const F used = no_soft_term ? zero : w[k];
        const F center = reverse ? teachers[k].cross * inverse_sum : teachers[k].center;
        coefficients.teacher[k] = used;
        coefficients.center[k] = center;
        // An infinite reverse KL makes the whole row NaN, also where e^{(s - max) / T} is 0.
        nan = nan + product_or_zero<Math>(used, center - center);
    }
    coefficients.student1 = coefficients.student1 + nan;
    coefficients.studentT = (reverse ? soft_scale * Math::set(1.0f / T) : soft_scale) * inverse_sum;
}

// The rest of the results: divergences and losses. Must come after compute_weights.
template <class Math, class F>
CAMKD_HD void compute_losses(const Formula& formula, int K, const RowSums<F>& student, const RowSums<F>* teachers,
                             F label_nan, RowResult<F>& result) {
    F soft = Math::set(0.0f);
    for (int k = 0; k < K; ++k) {
        result.divergence[k] = divergence_of<Math>(formula, student, teachers[k]);
        soft = soft + product_or_zero<Math>(result.weights[k], result.divergence[k]);
    }
    const float T = formula.temperature;
    result.hard = Math::log(student.sum1) - student.label;
    result.soft = Math::set(formula.scale_by_t2 ? T * T : 1.0f) * soft;
    // A label outside [0, C) makes the whole row NaN, whatever the weights are.
    result.loss = product_or_zero<Math>(Math::set(formula.hard_weight), result.hard) +
                  product_or_zero<Math>(Math::set(formula.soft_weight), result.soft) + label_nan;
    if (formula.z_loss_weight != 0) {
        const F lse = log_sum<Math>(student);
        result.loss = result.loss + Math::set(formula.z_loss_weight) * (lse * lse);
    }
    if (formula.entropy) result.entropy = Math::log(student.sumT) - student.plogp / (student.sumT * Math::set(T));
}

}  // namespace camkd
