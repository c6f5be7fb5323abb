// The passes of one thread over its vectors of a row: statistics, sums over the mixtures, gradient. Formulas and edges:
// camkd_fast/backends/divergences.py.
#pragma once

#include <cfloat>

#include "reader.cuh"

namespace camkd::cuda {

using State = StreamState<float>;

// This thread's sums of each teacher, in shared memory: so they take no registers, whatever the number of teachers.
// Those of neighbouring threads lie side by side.
struct OwnSums {
    enum { kMax, kSumT, kSum1, kCross, kPlogp, kNumbers };
    enum { kDivergence, kCenter };  // of a mixture, after the others have been merged
    float* first;

    CAMKD_DEVICE float& at(int k, int i) const { return first[((k - 1) * kNumbers + i) * block_threads()]; }
    CAMKD_DEVICE State load(int k) const {
        State state;
        state.max = at(k, kMax);
        state.sumT = at(k, kSumT);
        state.sum1 = at(k, kSum1);
        state.cross = at(k, kCross);
        state.plogp = at(k, kPlogp);
        return state;
    }
    CAMKD_DEVICE void store(int k, const State& state) const {
        at(k, kMax) = state.max;
        at(k, kSumT) = state.sumT;
        at(k, kSum1) = state.sum1;
        at(k, kCross) = state.cross;
        at(k, kPlogp) = state.plogp;
    }
};

// Moves the student's sums to another maximum, and those of a teacher; `before` is the student before its own move.
CAMKD_DEVICE void move_to(const Formula& formula, State& student, float max, float inverseT) {
    if (formula.entropy) move_entropy(student, max, inverseT);
    move_student(student, max, inverseT);
}
CAMKD_DEVICE void move_to(const Formula& formula, State& teacher, float max, const State& before, float student_max,
                          float inverseT) {
    if (formula.divergence == Divergence::reverse_kl)
        move_reverse(teacher, max, before, student_max, inverseT);
    else
        move_teacher(teacher, max, before.max, student_max, inverseT);
}

template <int V>
CAMKD_DEVICE float max_of(float max, const float (&x)[V]) {
#pragma unroll
    for (int j = 0; j < V; ++j) max = fmaxf(max, x[j]);
    return max;
}

// Replaces logits by their distances from the maximum.
template <int V>
CAMKD_DEVICE void subtract(float max, float (&x)[V]) {
    const float reference = finite(max);
#pragma unroll
    for (int j = 0; j < V; ++j) x[j] -= reference;
}

// e^d from a distance and from e = e^{d/T}.
CAMKD_DEVICE float at_one(const Temperature& temperature, float d, float e) {
    return temperature.power ? temperature.raise(e) : exp2_fast(d * kLog2E);
}

// Adds the columns of a vector to the student's sums.
template <int V>
CAMKD_DEVICE void add_student(const FormulaLaunch& launch, const float (&d)[V], const float (&e)[V], State& student) {
    const bool entropy = launch.args.formula.entropy;
#pragma unroll
    for (int j = 0; j < V; ++j) {
        student.sumT += e[j];
        student.sum1 += at_one(launch.temperature, d[j], e[j]);
        if (entropy && e[j] > 0) student.plogp = fmaf(e[j], d[j], student.plogp);
    }
}

// Adds the columns of a vector to a teacher's sums, given the student's distances and exponentials. Probability 0
// contributes 0, even where a difference is infinite.
template <int V>
CAMKD_DEVICE void add_teacher(const FormulaLaunch& launch, const float (&d)[V], const float (&e)[V],
                              const float (&z)[V], State& teacher) {
    const Formula& formula = launch.args.formula;
    const bool forward = formula.divergence == Divergence::forward_kl;
    const bool reverse = formula.divergence == Divergence::reverse_kl;
    const bool entropy = formula.weighting == Weighting::entropy;
#pragma unroll
    for (int j = 0; j < V; ++j) {
        const float e_z = exp2_fast(z[j] * launch.temperature.scale);
        const float e1 = at_one(launch.temperature, z[j], e_z);
        teacher.sumT += e_z;
        teacher.sum1 += e1;
        if (forward && e_z > 0) teacher.cross = fmaf(e_z, z[j] - d[j], teacher.cross);
        if (reverse && e[j] > 0) teacher.cross = fmaf(e[j], d[j] - z[j], teacher.cross);
        if (entropy && e1 > 0) teacher.plogp = fmaf(e1, z[j], teacher.plogp);
    }
}

// Statistics of this thread's columns, relative to the maxima among them.
template <class T>
CAMKD_DEVICE void sum_up(const FormulaLaunch& launch, const ThreadGroup& group, RowReader<T> reader, const OwnSums& own,
                         float inverseT, State& student) {
    constexpr int V = kVector<T>;
    const Formula& formula = launch.args.formula;
    for (int k = 1; k <= launch.args.K; ++k) own.store(k, State());
#pragma unroll 1
    for (int v = group.member; v < reader.columns().vectors; v += group.members) {
        float d[V], e[V];
        reader.take_logits(0, v, d);
        const State before = student;
        const float top = max_of(student.max, d);
        if (top > student.max) move_to(formula, student, top, inverseT);
        subtract(student.max, d);
#pragma unroll
        for (int j = 0; j < V; ++j) e[j] = exp2_fast(d[j] * launch.temperature.scale);
        add_student(launch, d, e, student);
#pragma unroll 1
        for (int k = 1; k <= launch.args.K; ++k) {
            float z[V];
            reader.take_logits(k, v, z);
            State teacher = own.load(k);
            const float max = max_of(teacher.max, z);
            if (max > teacher.max || student.max != before.max)
                move_to(formula, teacher, max, before, student.max, inverseT);
            subtract(teacher.max, z);
            add_teacher(launch, d, e, z, teacher);
            own.store(k, teacher);
        }
    }
}

// Of one column: the term of D that does not cancel (camkd_fast/backends/divergences.py) and g, for probabilities q of
// the student and p of a teacher. A probability of 0 gets the logarithm of the least float.
struct MixedTerm {
    float divergence, g;
};
CAMKD_DEVICE MixedTerm mixed_term(const Formula& formula, float q, float p) {
    const auto log_of = [](float ratio) { return std::log(ScalarMath::max(FLT_MIN, ratio)); };
    // x log x - x + 1
    const auto excess = [](float ratio, float log) { return fmaf(ratio, log, 1.0f - ratio); };
    const float of_p = formula.mixture_share, of_q = formula.mixture_other, m = fmaf(of_p, p, of_q * q);
    const float inverse = reciprocal(ScalarMath::max(FLT_MIN, m)), p_ratio = p * inverse;
    const float p_excess = excess(p_ratio, log_of(p_ratio));
    if (formula.divergence == Divergence::skew) return {m * p_excess, -of_q * p_ratio};
    const float q_ratio = q * inverse, log_q = log_of(q_ratio);
    return {m * fmaf(of_p, p_excess, of_q * excess(q_ratio, log_q)), of_q * log_q};
}

// The sums and coefficients of a row, which its passes after the first one need.
struct RowNumbers {
    RowSums<float> sums[kMaxStreams];
    float inverse[kMaxStreams];  // 1 / sumT, for probabilities
    GradCoefficients<float> coefficients;
};

// Computes this thread's sums over the mixtures of jsd and skew.
template <class T>
CAMKD_DEVICE void mix(const FormulaLaunch& launch, const ThreadGroup& group, RowReader<T> reader, const OwnSums& own,
                      const RowNumbers& row) {
    constexpr int V = kVector<T>;
    const float scale = launch.temperature.scale;
    for (int k = 1; k <= launch.args.K; ++k) own.at(k, OwnSums::kDivergence) = own.at(k, OwnSums::kCenter) = 0;
#pragma unroll 1
    for (int v = group.member; v < reader.columns().vectors; v += group.members) {
        float q[V];
        reader.take_logits(0, v, q);
        subtract(row.sums[0].max, q);
#pragma unroll
        for (int j = 0; j < V; ++j) q[j] = exp2_fast(q[j] * scale) * row.inverse[0];
#pragma unroll 1
        for (int k = 1; k <= launch.args.K; ++k) {
            float z[V], divergence = own.at(k, OwnSums::kDivergence), center = own.at(k, OwnSums::kCenter);
            reader.take_logits(k, v, z);
            subtract(row.sums[k].max, z);
#pragma unroll
            for (int j = 0; j < V; ++j) {
                const MixedTerm term = mixed_term(launch.args.formula, q[j], exp2_fast(z[j] * scale) * row.inverse[k]);
                divergence += term.divergence;
                center = fmaf(q[j], term.g, center);
            }
            own.at(k, OwnSums::kDivergence) = divergence;
            own.at(k, OwnSums::kCenter) = center;
        }
    }
}

// Adds a teacher's part of the soft gradient of a vector, of which GradCoefficients says what it is.
template <int V>
CAMKD_DEVICE void add_soft_part(const FormulaLaunch& launch, const RowNumbers& row, int k, const float (&d)[V],
                                const float (&e)[V], const float (&z)[V], float (&soft)[V]) {
    const Formula& formula = launch.args.formula;
    const float coefficient = row.coefficients.teacher[k - 1], center = row.coefficients.center[k - 1];
#pragma unroll
    for (int j = 0; j < V; ++j) {
        if (formula.divergence == Divergence::reverse_kl) {
            soft[j] = fmaf(coefficient, (d[j] - z[j]) - center, soft[j]);
            continue;
        }
        const float e_z = exp2_fast(z[j] * launch.temperature.scale);
        if (formula.divergence == Divergence::forward_kl)
            soft[j] = fmaf(-coefficient, e_z, soft[j]);
        else
            soft[j] =
                fmaf(coefficient, mixed_term(formula, e[j] * row.inverse[0], e_z * row.inverse[k]).g - center, soft[j]);
    }
}

// Writes the gradient of this thread's columns to `out`, which may be the student's row: a vector is read before it is
// written, and by no other thread. `at_label`: the coefficient of the one-hot label.
template <class T>
CAMKD_DEVICE void write_gradient(const FormulaLaunch& launch, const ThreadGroup& group, RowReader<T> reader,
                                 const RowNumbers& row, const RowLabels& labels, float at_label, char* out) {
    constexpr int V = kVector<T>;
    const Formula& formula = launch.args.formula;
    const bool forward = formula.divergence == Divergence::forward_kl;
    const float studentT = row.coefficients.studentT, student1 = row.coefficients.student1;
    Columns to = reader.columns();
    if (!launch.wide_out) to.whole = 0;
#pragma unroll 1
    for (int v = group.member; v < to.vectors; v += group.members) {
        const Pack student = reader.take(0, v);
        float d[V], e[V], x[V] = {};
        reader.logits(student, 0, v, d);
        subtract(row.sums[0].max, d);
#pragma unroll
        for (int j = 0; j < V; ++j) e[j] = exp2_fast(d[j] * launch.temperature.scale);
        // Soft part
#pragma unroll 1
        for (int k = 1; k <= launch.args.K; ++k) {
            float z[V];
            const Pack teacher = reader.take(k, v);
            // Weight 0 drops even a teacher whose logits are NaN.
            if (row.coefficients.teacher[k - 1] == 0) continue;
            reader.logits(teacher, k, v, z);
            subtract(row.sums[k].max, z);
            add_soft_part(launch, row, k, d, e, z, x);
        }
        // Hard part, added at last: to the label's 1 each of K small terms would be rounded to its scale
        const int64_t first = int64_t(v) * V - to.phase;
#pragma unroll
        for (int j = 0; j < V; ++j) {
            float hard = student1 * at_one(launch.temperature, d[j], e[j]);
            if (first + j == labels.first) hard -= at_label * labels.share;
            if (first + j == labels.second) hard -= at_label * (1.0f - labels.share);
            const float soft = forward ? fmaf(studentT, e[j], x[j]) : e[j] == 0 ? 0.0f : studentT * e[j] * x[j];
            x[j] = soft + hard;
        }
        if (formula.maps) {
            float from[V];
            Elements<T>::unpack(student, from);
            const LogitCurve curve(formula.logit_maps[0]);
#pragma unroll
            for (int j = 0; j < V; ++j) x[j] *= curve.slope(from[j]);
        }
        store_vector<T>(out, launch.args.streams[0].dtype, to, v, x);
    }
}

}  // namespace camkd::cuda
