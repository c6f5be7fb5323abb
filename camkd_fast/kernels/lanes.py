"""Running statistics of a row in lanes: the columns that one thread loads, with a maximum and sums of their own."""

import triton
import triton.language as tl

from .divergences import distances, mixture_terms
from .logit_map import load_logits
from .softmax import LOWEST, exp_at_one, lane_max, lane_rescale


@triton.jit
def in_lanes(x, R: tl.constexpr, VEC: tl.constexpr, ALIGN: tl.constexpr):
    """Columns as fp32 lanes (R, VEC); the columns of a lane were loaded by one thread.

    Aligned rows are loaded in vectors of VEC neighbours, others element by element with a distance of R columns.
    """
    x = x.to(tl.float32)
    if ALIGN == 1:
        return tl.trans(x.reshape(VEC, R))
    else:
        return x.reshape(R, VEC)


@triton.jit
def student_step(lanes, s, exp2_scale, T_POWER: tl.constexpr, ENTROPY: tl.constexpr):
    """The student's lanes (R,) updated with its columns s (R, VEC).

    lanes: maximum, sum e^{s/T}, sum e^s, sum e^{s/T} s, all relative to the maximum.
    Returns also, for `teacher_step`: s minus its running maximum, e^{s/T}, and the last change of both.
    """
    top, sumT, sum1, plogp = lanes
    top, drop = lane_max(top, s)
    s -= top[:, None]
    e = tl.exp2(s * exp2_scale)
    decay = tl.exp2(drop * exp2_scale)
    if ENTROPY:
        plogp = lane_rescale(plogp + sumT * drop, decay) + tl.sum(tl.where(e > 0, e * s, 0.0), axis=1)
    sumT = sumT * decay + tl.sum(e, axis=1)
    sum1 = sum1 * exp_at_one(decay, drop, T_POWER) + tl.sum(exp_at_one(e, s, T_POWER), axis=1)
    return (top, sumT, sum1, plogp), s, e, drop, decay


@triton.jit
def student_total(lanes, exp2_scale, T_POWER: tl.constexpr, ENTROPY: tl.constexpr):
    """The lanes of `student_step` reduced to scalars; also, for `teacher_total`, their changes to the row's maximum."""
    top, sumT, sum1, plogp = lanes
    highest = tl.max(top, axis=0)
    drop = top - highest
    decay = tl.exp2(drop * exp2_scale)
    totalT = tl.sum(sumT * decay, axis=0)
    total1 = tl.sum(sum1 * exp_at_one(decay, drop, T_POWER), axis=0)
    total_plogp = 0.0
    if ENTROPY:
        total_plogp = tl.sum(lane_rescale(plogp + sumT * drop, decay), axis=0)
    return (highest, totalT, total1, total_plogp), drop, decay


@triton.jit
def teacher_step(
    lanes, z, s, e_s, moved, exp2_scale,
    T_POWER: tl.constexpr, WEIGHTING: tl.constexpr, DIVERGENCE: tl.constexpr,
):  # fmt: skip
    """A teacher's lanes (R,) updated with its columns z (R, VEC).

    lanes: maximum, sum e^{z/T}, sum e^z, cross, sum e^z z, all relative to the maxima of z and s; cross is
    sum e^{z/T} (z - s), or sum e^{s/T} (s - z) of the reverse KL.
    s: the student's columns minus its running maximum; e_s: e^{s/T}; moved: the last change of that maximum and of
    e^{s/T}, and the sum of e^{s/T} before it.
    """
    s_drop, s_decay, s_sumT = moved
    top, sumT, sum1, cross, plogp = lanes
    top, drop = lane_max(top, z)
    z -= top[:, None]
    e = tl.exp2(z * exp2_scale)
    e1 = exp_at_one(e, z, T_POWER)
    decay = tl.exp2(drop * exp2_scale)
    decay1 = exp_at_one(decay, drop, T_POWER)
    if DIVERGENCE == "forward_kl":
        cross = lane_rescale(cross + sumT * (drop - s_drop), decay) + tl.sum(tl.where(e > 0, e * (z - s), 0.0), axis=1)
    elif DIVERGENCE == "reverse_kl":
        cross = lane_rescale(cross + s_sumT * (s_drop - drop), s_decay) + tl.sum(e_s * distances(e_s, s, z), axis=1)
    if WEIGHTING == "entropy":
        plogp = lane_rescale(plogp + sum1 * drop, decay1) + tl.sum(tl.where(e1 > 0, e1 * z, 0.0), axis=1)
    return top, sumT * decay + tl.sum(e, axis=1), sum1 * decay1 + tl.sum(e1, axis=1), cross, plogp


@triton.jit
def teacher_total(
    lanes, moved, exp2_scale, T_POWER: tl.constexpr, WEIGHTING: tl.constexpr, DIVERGENCE: tl.constexpr
):  # fmt: skip
    """The lanes of `teacher_step` reduced to scalars; moved: of the student's lanes to the row's maximum."""
    s_drop, s_decay, s_sumT = moved
    top, sumT, sum1, cross, plogp = lanes
    highest = tl.max(top, axis=0)
    drop = top - highest
    decay = tl.exp2(drop * exp2_scale)
    decay1 = exp_at_one(decay, drop, T_POWER)
    if DIVERGENCE == "reverse_kl":
        cross = tl.sum(lane_rescale(cross + s_sumT * (s_drop - drop), s_decay), axis=0)
    else:
        cross = tl.sum(lane_rescale(cross + sumT * (drop - s_drop), decay), axis=0)
    total_plogp = 0.0
    if WEIGHTING == "entropy":
        total_plogp = tl.sum(lane_rescale(plogp + sum1 * drop, decay1), axis=0)
    return highest, tl.sum(sumT * decay, axis=0), tl.sum(sum1 * decay1, axis=0), cross, total_plogp


@triton.jit
def group_lanes(
    s_row, z_rows, limit, formula, first: tl.constexpr,
    K: tl.constexpr, T_POWER: tl.constexpr, WEIGHTING: tl.constexpr, DIVERGENCE: tl.constexpr, ENTROPY: tl.constexpr,
    MAPS: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, VEC: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The lanes of the student and of teachers first .. first + GROUP - 1 after the whole row."""
    R: tl.constexpr = BLOCK_C // VEC
    exp2_scale = formula.exp2_scale
    top = tl.full((R,), LOWEST, tl.float32)
    zeros = tl.zeros((R,), tl.float32)
    s_lanes, lanes = (top, zeros, zeros, zeros), ()
    for k in tl.static_range(first, first + GROUP):
        if k < K:
            lanes += ((top, zeros, zeros, zeros, zeros),)
    for start in range(0, limit, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        s = in_lanes(load_logits(s_row + cols, formula.maps, 0, MAPS, mask=cols < limit), R, VEC, ALIGN)
        s_sumT = s_lanes[1]
        s_lanes, s, e, s_drop, s_decay = student_step(s_lanes, s, exp2_scale, T_POWER, ENTROPY)
        updated = ()
        for k in tl.static_range(first, first + GROUP):
            if k < K:
                z = load_logits(z_rows[k] + cols, formula.maps, k + 1, MAPS, mask=cols < limit)
                z = in_lanes(z, R, VEC, ALIGN)
                moved = (s_drop, s_decay, s_sumT)
                step = teacher_step(lanes[k - first], z, s, e, moved, exp2_scale, T_POWER, WEIGHTING, DIVERGENCE)
                updated += (step,)
        lanes = updated
    return s_lanes, lanes


@triton.jit
def mixture_sums(
    s_row, s_top, s_sumT, z_rows, z_top, z_sumT, limit, formula,
    K: tl.constexpr, DIVERGENCE: tl.constexpr, MAPS: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, VEC: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """D and center of K teachers (see `divergences`) by reading the row again, whose maxima and sums are known."""
    R: tl.constexpr = BLOCK_C // VEC
    divergence, centers = (), ()
    blocks = tl.cdiv(limit, BLOCK_C)
    for first in tl.static_range(0, K, GROUP):
        sums = ()
        for k in tl.static_range(first, first + GROUP):
            if k < K:
                sums += ((tl.zeros((R,), tl.float32), tl.zeros((R,), tl.float32)),)
        for i in range(blocks):
            # In reverse: the columns that were read last are the ones in L2.
            cols = (blocks - 1 - i) * BLOCK_C + tl.arange(0, BLOCK_C)
            s = in_lanes(load_logits(s_row + cols, formula.maps, 0, MAPS, mask=cols < limit), R, VEC, ALIGN) - s_top
            q = tl.exp2(s * formula.exp2_scale) * (1.0 / s_sumT)
            updated = ()
            for k in tl.static_range(first, first + GROUP):
                if k < K:
                    z = load_logits(z_rows[k] + cols, formula.maps, k + 1, MAPS, mask=cols < limit)
                    z = in_lanes(z, R, VEC, ALIGN) - z_top[k]
                    p = tl.exp2(z * formula.exp2_scale) * (1.0 / z_sumT[k])
                    term, g = mixture_terms(q, p, formula, DIVERGENCE)
                    of_terms, of_centers = sums[k - first]
                    updated += ((of_terms + tl.sum(term, axis=1), of_centers + tl.sum(q * g, axis=1)),)
            sums = updated
        for k in tl.static_range(first, first + GROUP):
            if k < K:
                divergence += (tl.sum(sums[k - first][0], axis=0),)
                centers += (tl.sum(sums[k - first][1], axis=0),)
    return divergence, centers
