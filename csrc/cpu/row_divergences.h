// What the divergences other than the forward KL need beyond row_blocks.h: a pass over the exponentials of a block for
// jsd and skew, whose mixture takes the sums of the whole row; a gradient that is a product with the student's
// probabilities; and sums that move to other maxima.
#pragma once

#include <cfloat>

#include "row_blocks.h"

namespace camkd::cpu {
namespace {

struct MixedSums {
    double divergence = 0, center = 0;  // sum of D's terms, sum q g

    void add(const MixedSums& other) {
        divergence += other.divergence;
        center += other.center;
    }
};

// D's terms and g of n columns (camkd_fast/backends/divergences.py, with the terms that do not cancel) of q = student
// e_s and p = teacher e_z; g takes the place of e_z. A probability of 0 gets the logarithm of the least float.
template <bool Jsd>
void mixed_block(const float* e_s, float student, float teacher, const Formula& formula, int n, float* e_z,
                 MixedSums& sums) {
    constexpr int W = Vec::width;
    const Vec of_p = Vec::set(formula.mixture_share), of_q = Vec::set(formula.mixture_other);
    const Vec least = Vec::set(FLT_MIN), one = Vec::set(1.0f);
    Vec divergence = Vec::zero(), center = Vec::zero();
    auto log_of = [&](Vec ratio) { return LaneMath::log(Vec::max(least, ratio)); };
    // x log x - x + 1
    auto excess = [&](Vec ratio, Vec log) { return Vec::fma(ratio, log, one - ratio); };
    auto step = [&](int i, auto counts) {
        const Vec q = Vec::set(student) * Vec::load(e_s + i), p = Vec::set(teacher) * Vec::load(e_z + i);
        const Vec m = Vec::fma(of_p, p, of_q * q), inverse = one / Vec::max(least, m), p_ratio = p * inverse;
        Vec term = excess(p_ratio, log_of(p_ratio)), g;
        if constexpr (Jsd) {
            const Vec q_ratio = q * inverse, log_q = log_of(q_ratio);
            term = Vec::fma(of_p, term, of_q * excess(q_ratio, log_q));
            g = of_q * log_q;
        } else {
            g = Vec::zero() - of_q * p_ratio;
        }
        g.store(e_z + i);
        divergence = divergence + counts(m * term);
        center = center + counts(q * g);
    };
    int i = 0;
    for (; i + W <= n; i += W) step(i, [](Vec v) { return v; });
    // Beyond the end of a row its scratch is padding
    if (i < n) step(i, [mask = first_lanes(n - i)](Vec v) { return Vec::bit_and(v, mask); });
    sums.divergence += divergence.sum();
    sums.center += center.sum();
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
        Vec soft = Vec::zero();
        for (int k = 0; k < n_terms; ++k) {
            const Vec x = Vec::load(terms[k].e + i);
            soft = Vec::fma(Vec::set(terms[k].coefficient), (d_s ? d - x : x) - Vec::set(terms[k].center), soft);
        }
        return Vec::fma(b, Power == 0 ? Vec::load(e1_s + i) : power<Power>(e), Vec::zero_where_zero(a * e * soft, e));
    };
    int i = 0;
    for (; i + W <= n; i += W) store(out + i, value(i));
    if (i < n) store_tail(out + i, value(i), n - i);
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

// merge_states of row_math.h for every formula: adds to `a` the sums `b` of other columns of the same row.
inline void merge_states(const Formula& formula, State* a, State* b, int K, double inverseT) {
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
