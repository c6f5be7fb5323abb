// What the divergences other than the forward KL need beyond row_blocks.h: a pass over the exponentials of a block for
// jsd and skew, whose mixture takes the sums of the whole row; a gradient that is a product with the student's
// probabilities; and sums that move to other maxima.
#pragma once

#include <cfloat>

#include "row_blocks.h"

namespace camkd::cpu {
namespace {

// Whether the divergence is of a mixture of student and teacher.
inline bool mixes(const Formula& formula) {
    return formula.divergence == Divergence::jsd || formula.divergence == Divergence::skew;
}

struct MixedSums {
    double divergence = 0, slope = 0;  // sum of D's terms, sum q g

    void add(const MixedSums& other) {
        divergence += other.divergence;
        slope += other.slope;
    }
};

// D's terms and g of n columns (camkd_fast/backends/divergences.py) of q = student e_s and p = teacher e_z; g takes the
// place of e_z. Probabilities of 0 give terms of 0: the logarithm is that of the least float.
template <bool Jsd>
void mixed_block(const float* e_s, float student, float teacher, float share, int n, float* e_z, MixedSums& sums) {
    constexpr int W = Vec::width;
    const Vec of_p = Vec::set(share), of_q = Vec::set(1.0f - share), least = Vec::set(FLT_MIN);
    Vec divergence = Vec::zero(), slope = Vec::zero();
    auto step = [&](int i, auto counts) {
        const Vec q = Vec::set(student) * Vec::load(e_s + i), p = Vec::set(teacher) * Vec::load(e_z + i);
        const Vec inverse = Vec::set(1.0f) / Vec::max(least, Vec::fma(of_p, p, of_q * q));
        const Vec ratio = p * inverse, log_p = LaneMath::log(Vec::max(least, ratio));
        Vec term, g;
        if constexpr (Jsd) {
            const Vec log_q = LaneMath::log(Vec::max(least, q * inverse));
            term = Vec::fma(of_p * p, log_p, of_q * q * log_q);
            g = of_q * log_q;
        } else {
            term = p * log_p;
            g = Vec::zero() - of_q * ratio;
        }
        g.store(e_z + i);
        divergence = divergence + counts(term);
        slope = slope + counts(q * g);
    };
    int i = 0;
    for (; i + W <= n; i += W) step(i, [](Vec v) { return v; });
    // Beyond the end of a row its scratch is padding
    if (i < n) step(i, [mask = first_lanes(n - i)](Vec v) { return Vec::bit_and(v, mask); });
    sums.divergence += divergence.sum();
    sums.slope += slope.sum();
}

// out = studentT e_s sum_k coefficient_k (x_k - center_k) + student1 e1_s, for n columns; x_k is the term's array, or
// d_s minus it if there are distances d_s of the student (reverse KL). Centered term by term, because the sums are
// large where student and teachers agree. Columns of probability 0 have no soft part, although their distances are
// infinite.
template <class T, int Power>
void product_grad_block(const float* e_s, const float* e1_s, const float* d_s, float studentT, float student1,
                        const Term* terms, int n_terms, T* out, int n) {
    constexpr int W = Vec::width;
    const Vec a = Vec::set(studentT), b = Vec::set(student1);
    auto value = [&](int i) {
        const Vec e = Vec::load(e_s + i), d = d_s ? Vec::load(d_s + i) : Vec::zero();
        Vec slope = Vec::zero();
        for (int k = 0; k < n_terms; ++k) {
            const Vec x = Vec::load(terms[k].e + i);
            slope = Vec::fma(Vec::set(terms[k].coefficient), (d_s ? d - x : x) - Vec::set(terms[k].center), slope);
        }
        return Vec::fma(b, Power == 0 ? Vec::load(e1_s + i) : power<Power>(e), Vec::zero_where_zero(a * e * slope, e));
    };
    int i = 0;
    for (; i + W <= n; i += W) store(out + i, value(i));
    if (i < n) store_tail(out + i, value(i), n - i);
}

// The student's `plogp`, sum e^{d/T} d, relative to a new maximum. Must come before move_student.
inline void move_entropy(State& student, float new_max, double inverseT) {
    if (student.max == new_max || student.max == -INFINITY) return;
    const double factor = shift_factor(student.max, new_max, inverseT);
    student.plogp = factor * (student.plogp + (double(student.max) - new_max) * student.sumT);
}

// move_teacher for the reverse KL, whose `cross` is sum e^{d_s/T} (d_s - d_z): the student's old sums decide.
inline void move_reverse(State& teacher, float new_max, const State& old_student, float new_student, double inverseT) {
    const double own = teacher.max == -INFINITY ? 0.0 : double(new_max) - teacher.max;
    const double students = old_student.max == -INFINITY ? 0.0 : double(new_student) - old_student.max;
    const double factor = shift_factor(old_student.max, new_student, inverseT);
    const double cross = factor > 0 ? factor * (teacher.cross + (own - students) * old_student.sumT) : 0.0;
    teacher.cross = 0;
    move_teacher(teacher, new_max, new_student, new_student, inverseT);
    teacher.cross = cross;
}

// Moves the K + 1 states of a row to these maxima.
inline void move_states(const Formula& formula, State* states, const float* maxima, int K, double inverseT) {
    const State student = states[0];
    if (formula.entropy) move_entropy(states[0], maxima[0], inverseT);
    move_student(states[0], maxima[0], inverseT);
    const bool reverse = formula.divergence == Divergence::reverse_kl;
    for (int k = 1; k <= K; ++k) {
        if (reverse)
            move_reverse(states[k], maxima[k], student, maxima[0], inverseT);
        else
            move_teacher(states[k], maxima[k], student.max, maxima[0], inverseT);
    }
}

// Adds to `a` the sums `b` of other columns of the same row, like merge_states.
inline void merge_rows(const Formula& formula, State* a, State* b, int K, double inverseT) {
    float maxima[kMaxStreams];
    for (int k = 0; k <= K; ++k) maxima[k] = std::max(a[k].max, b[k].max);
    for (State* states : {a, b}) move_states(formula, states, maxima, K, inverseT);
    for (int k = 0; k <= K; ++k) {
        a[k].sumT += b[k].sumT;
        a[k].sum1 += b[k].sum1;
        a[k].cross += b[k].cross;
        a[k].plogp += b[k].plogp;
    }
}

}  // namespace
}  // namespace camkd::cpu
