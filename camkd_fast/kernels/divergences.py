"""The divergences other than the forward KL: their sums over a row, and their gradients by the student.

Formulas and edges: `camkd_fast.backends.divergences`. Of one row, q are the student's probabilities and p a teacher's,
s and z their logits minus the maxima. A gradient is

    T dD / ds_c = q_c (x_c - center)       x = g for a mixture, center = sum_j q_j x_j
    T dD / ds_c = q_c (x_c - center) / T   x = s - z for the reverse KL

It is centered teacher by teacher, because the x are large where student and teachers agree.
"""

import triton
import triton.language as tl

# Least normal float: in the place of a probability of 0 whose logarithm is multiplied by 0.
LEAST = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def kl_of_sums(cross, sumT, other_sumT, temperature):
    """KL(a || b) from sum e^{a/T} (a - b) and sum e^{a/T} of a, and the latter of b."""
    # One logarithm of the ratio: a difference of two would cancel when student and teacher agree.
    return cross / (sumT * temperature) + tl.log(other_sumT / sumT)


@triton.jit
def distances(e_s, s, z):
    """s - z of the reverse KL; 0 where the student's probability is 0, whatever the teacher's is."""
    return tl.where(e_s > 0, s - z, 0.0)


@triton.jit
def mixture_terms(q, p, formula, DIVERGENCE: tl.constexpr):
    """The term of D that does not cancel, and g, of every column, for M = mixture_share p + mixture_other q."""
    m = formula.mixture_share * p + formula.mixture_other * q
    # Comparisons rather than maxima, which would drop a NaN.
    inverse = 1.0 / tl.where(m < LEAST, LEAST, m)
    p_excess, _ = excess(p * inverse)
    if DIVERGENCE == "jsd":
        q_excess, log_q = excess(q * inverse)
        return m * (formula.mixture_share * p_excess + formula.mixture_other * q_excess), formula.mixture_other * log_q
    else:
        return m * p_excess, -formula.mixture_other * (p * inverse)


@triton.jit
def excess(x):
    """x log x - x + 1, and log x."""
    log_x = tl.log(tl.where(x < LEAST, LEAST, x))
    return x * log_x + (1.0 - x), log_x


@triton.jit
def onchip_divergence(e_s, s, s_sumT, e, z, z_sumT, formula, DIVERGENCE: tl.constexpr):
    """D, center and the tile x - center of a teacher, from tiles (BLOCK_N, BLOCK_C) of whole rows.

    e_s, e: e^{s/T} and e^{z/T}. The tile is 0 if its center is not finite, see `infinite_gradient`.
    """
    if DIVERGENCE == "reverse_kl":
        x = distances(e_s, s, z)
        cross = tl.sum(e_s * x, axis=1)
        divergence = kl_of_sums(cross, s_sumT, z_sumT, formula.temperature)
        center = cross / s_sumT
    else:
        q = e_s * (1.0 / s_sumT)[:, None]
        term, x = mixture_terms(q, e * (1.0 / z_sumT)[:, None], formula, DIVERGENCE)
        divergence = tl.sum(term, axis=1)
        center = tl.sum(q * x, axis=1)
    return divergence, center, tl.where((center - center == 0)[:, None], x - center[:, None], 0.0)


@triton.jit
def column_slopes(e_s, s, s_sumT, z, z_sumT, formula, DIVERGENCE: tl.constexpr):
    """x of some columns of a teacher, from the sums of the whole row."""
    if DIVERGENCE == "reverse_kl":
        return distances(e_s, s, z)
    else:
        p = tl.exp2(z * formula.exp2_scale) * (1.0 / z_sumT)
        return mixture_terms(e_s * (1.0 / s_sumT), p, formula, DIVERGENCE)[1]


@triton.jit
def infinite_gradient(centers, weights, K: tl.constexpr):
    """0, or NaN for rows whose gradient is not finite: an infinite reverse KL, or NaN, of a weight that is not 0."""
    total = tl.zeros_like(centers[0])
    for k in tl.static_range(K):
        total += tl.where(weights[k] == 0, 0.0, centers[k] - centers[k])
    return total


@triton.jit
def soft_gradient(q, mixed, infinite, formula, DIVERGENCE: tl.constexpr):
    """The part of the gradient that `grad_student_terms` scales, from q and sum_k w_k (x_k - center_k)."""
    if DIVERGENCE == "reverse_kl":
        mixed = mixed * (1.0 / formula.temperature)
    return q * mixed + infinite
