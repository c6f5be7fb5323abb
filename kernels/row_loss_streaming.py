"""Row loss for rows of any width: running statistics over column blocks, then a second read for the gradient."""

import triton
import triton.language as tl

from .batch_mean import add_up_as_last, gradient_scale
from .results import grad_student_terms, store_loss, store_teacher
from .softmax import (
    LOWEST,
    exp_at_one,
    label_shares,
    lane_max,
    lane_rescale,
    load_labels,
    loaded_label_distance,
    row_offset,
    stride,
    weights_from_scores,
)


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
def teacher_step(lanes, z, s, s_drop, exp2_scale, T_POWER: tl.constexpr, WEIGHTING: tl.constexpr):
    """A teacher's lanes (R,) updated with its columns z (R, VEC).

    lanes: maximum, sum e^{z/T}, sum e^z, sum e^{z/T} (z - s), sum e^z z, all relative to the maxima of z and s.
    s: the student's columns minus its running maximum; s_drop: the last change of that maximum.
    """
    top, sumT, sum1, cross, plogp = lanes
    top, drop = lane_max(top, z)
    z -= top[:, None]
    e = tl.exp2(z * exp2_scale)
    e1 = exp_at_one(e, z, T_POWER)
    decay = tl.exp2(drop * exp2_scale)
    decay1 = exp_at_one(decay, drop, T_POWER)
    cross = lane_rescale(cross + sumT * (drop - s_drop), decay) + tl.sum(tl.where(e > 0, e * (z - s), 0.0), axis=1)
    if WEIGHTING == "entropy":
        plogp = lane_rescale(plogp + sum1 * drop, decay1) + tl.sum(tl.where(e1 > 0, e1 * z, 0.0), axis=1)
    return top, sumT * decay + tl.sum(e, axis=1), sum1 * decay1 + tl.sum(e1, axis=1), cross, plogp


@triton.jit
def teacher_total(lanes, s_drop, exp2_scale, T_POWER: tl.constexpr, WEIGHTING: tl.constexpr):
    """The lanes of `teacher_step` reduced to scalars; s_drop: the student's lane maxima minus their maximum."""
    top, sumT, sum1, cross, plogp = lanes
    highest = tl.max(top, axis=0)
    drop = top - highest
    decay = tl.exp2(drop * exp2_scale)
    decay1 = exp_at_one(decay, drop, T_POWER)
    cross = tl.sum(lane_rescale(cross + sumT * (drop - s_drop), decay), axis=0)
    total_plogp = 0.0
    if WEIGHTING == "entropy":
        total_plogp = tl.sum(lane_rescale(plogp + sum1 * drop, decay1), axis=0)
    return highest, tl.sum(sumT * decay, axis=0), tl.sum(sum1 * decay1, axis=0), cross, total_plogp


@triton.jit(
    do_not_specialize=[
        "stride_so", "stride_si", "stride_wk", "stride_wn",
        "N", "S", "C_units", "ignore_index",
    ]
)  # fmt: skip
def row_loss_streaming_fwd_kernel(
    student,  # (N, C)
    teachers,  # K pointers to (N, C)
    target, second_target, mix,  # (N,) int64, and int64 and fp32 or None
    given,  # (K, N) fp32 weights, or None
    row_stats,  # (3 + 3K, N) fp32
    grad_student,  # (N, C) contiguous, or None
    grad_scale,  # fp32 number, or pointer to one if SCALE_ON_DEVICE
    total_scale,  # fp32 number: the factor of the sums over the rows without a mean
    loss, others, counter,  # () fp32, (3,) fp32, (1,) int32; None without sums
    stride_so, stride_si,
    stride_to, stride_ti,  # K each, `unspecialised`
    stride_wk, stride_wn,
    N, S, C_units, ignore_index,
    formula,  # KernelFormula
    K: tl.constexpr,
    WEIGHTING: tl.constexpr,
    T_POWER: tl.constexpr,
    SCALE_ON_DEVICE: tl.constexpr,
    TWO_LEVEL: tl.constexpr,
    ALIGN: tl.constexpr,
    DEBUG: tl.constexpr,
    INVERSE: tl.constexpr, ADDS_UP: tl.constexpr, BLOCK_B: tl.constexpr,  # BatchLaunch
    BLOCK_C: tl.constexpr, VEC: tl.constexpr, GROUP: tl.constexpr,  # StreamingLaunch
):  # fmt: skip
    """One row per program, BLOCK_C columns per iteration.

    The VEC columns that one thread loads form a lane with its own maximum and sums, so the loop exchanges nothing
    between threads, at the cost of one more exponential per VEC elements. Teachers are processed in groups of GROUP to
    limit registers.
    """
    exp2_scale = formula.exp2_scale
    R: tl.constexpr = BLOCK_C // VEC
    n = tl.program_id(0).to(tl.int64)
    C = C_units * ALIGN
    TWO: tl.constexpr = second_target is not None
    labels, kept, inside = load_labels(target, second_target, mix, n, n < N, ignore_index, C, DEBUG)
    limit_units = tl.where(kept, C_units, 0)  # ignored rows are not read
    limit = limit_units * ALIGN
    s_row = student + row_offset(n, S, stride_so, stride_si, ALIGN, TWO_LEVEL)
    z_rows = ()
    for k in tl.static_range(K):
        z_rows += (teachers[k] + row_offset(n, S, stride(stride_to[k]), stride(stride_ti[k]), ALIGN, TWO_LEVEL),)

    scale, factor = gradient_scale(
        grad_scale, total_scale, others, target, N, ignore_index, SCALE_ON_DEVICE, INVERSE, BLOCK_B
    )

    # First read: statistics of the student and of a group of teachers
    z_top, z_totalT, divergence, scores = (), (), (), ()
    for first in tl.static_range(0, K, GROUP):
        s_max = tl.full((R,), LOWEST, tl.float32)
        s_sumT = tl.zeros((R,), tl.float32)
        s_sum1 = s_sumT
        lanes = ()
        for k in tl.static_range(first, first + GROUP):
            if k < K:
                lanes += ((s_max, s_sumT, s_sumT, s_sumT, s_sumT),)
        for start in range(0, limit, BLOCK_C):
            cols = start + tl.arange(0, BLOCK_C)
            s = in_lanes(tl.load(s_row + cols, mask=cols < limit, other=float("-inf")), R, VEC, ALIGN)
            s_max, s_drop = lane_max(s_max, s)
            s -= s_max[:, None]
            e = tl.exp2(s * exp2_scale)
            decay = tl.exp2(s_drop * exp2_scale)
            s_sumT = s_sumT * decay + tl.sum(e, axis=1)
            s_sum1 = s_sum1 * exp_at_one(decay, s_drop, T_POWER) + tl.sum(exp_at_one(e, s, T_POWER), axis=1)
            updated = ()
            for k in tl.static_range(first, first + GROUP):
                if k < K:
                    z = tl.load(z_rows[k] + cols, mask=cols < limit, other=float("-inf"))
                    z = in_lanes(z, R, VEC, ALIGN)
                    updated += (teacher_step(lanes[k - first], z, s, s_drop, exp2_scale, T_POWER, WEIGHTING),)
            lanes = updated

        # Reduce the lanes.
        s_top = tl.max(s_max, axis=0)
        s_drop = s_max - s_top
        decay = tl.exp2(s_drop * exp2_scale)
        s_totalT = tl.sum(s_sumT * decay, axis=0)
        s_total1 = tl.sum(s_sum1 * exp_at_one(decay, s_drop, T_POWER), axis=0)
        for k in tl.static_range(first, first + GROUP):
            if k < K:
                top, totalT, total1, cross, plogp = teacher_total(
                    lanes[k - first], s_drop, exp2_scale, T_POWER, WEIGHTING
                )
                log_sum = tl.log(total1)
                z_top += (top,)
                z_totalT += (totalT,)
                ce = log_sum - loaded_label_distance(z_rows[k], top, labels, kept & inside, TWO)
                # One logarithm of the ratio: a difference of two would cancel when student and teacher agree.
                kl = cross / (totalT * formula.temperature) + tl.log(s_totalT / totalT)
                store_teacher(row_stats, k, N, n, kl, ce, kept, n < N, K)
                divergence += (kl,)
                if WEIGHTING == "entropy":
                    # Both terms are positive: no cancellation, never below 0.
                    scores += (log_sum - plogp / total1,)
                else:
                    scores += (ce,)
    hard = tl.log(s_total1) - loaded_label_distance(s_row, s_top, labels, kept & inside, TWO)

    # Weights and row_stats
    weights = ()
    if WEIGHTING == "confidence" or WEIGHTING == "entropy":
        weights = weights_from_scores(scores, K, WEIGHTING)
    elif WEIGHTING == "given":
        for k in tl.static_range(K):
            weights += (tl.load(given + k * stride_wk + n * stride_wn),)
    else:
        for _ in tl.static_range(K):
            weights += (tl.full((), 1.0 / K, tl.float32),)
    weight_sum = store_loss(row_stats, N, n, hard, divergence, weights, kept, inside, n < N, formula, K)

    # Second read: the gradient
    if grad_student is not None:
        blocks = tl.cdiv(C, BLOCK_C)
        for i in range(blocks):
            # In reverse: the columns that the first loop read last are the ones in L2.
            cols = (blocks - 1 - i) * BLOCK_C + tl.arange(0, BLOCK_C)
            s = tl.load(s_row + cols, mask=cols < limit, other=float("-inf")).to(tl.float32) - s_top
            e = tl.exp2(s * exp2_scale)
            mixed = tl.zeros((BLOCK_C,), tl.float32)
            for k in tl.static_range(K):
                wanted, top = limit, z_top[k]
                coefficient = weights[k] / z_totalT[k]
                if WEIGHTING == "given":
                    # A teacher of weight 0 is not read, so even its NaN has no effect.
                    wanted = tl.where(weights[k] == 0, 0, limit_units) * ALIGN
                    top = tl.where(weights[k] == 0, 0.0, top)
                    coefficient = tl.where(weights[k] == 0, 0.0, coefficient)
                z = tl.load(z_rows[k] + cols, mask=cols < wanted, other=float("-inf")).to(tl.float32) - top
                mixed += tl.exp2(z * exp2_scale) * coefficient
            soft_part = e * (weight_sum / s_totalT) - mixed
            hard_part = exp_at_one(e, s, T_POWER) * (1.0 / s_total1) - label_shares(cols, labels, TWO)
            out = grad_student_terms(hard_part, soft_part, formula) * scale
            out = tl.where(inside, out, float("nan"))
            out = tl.where(kept, out, 0.0)
            tl.store(grad_student + n * C + cols, out.to(grad_student.dtype.element_ty), mask=cols < C)
    if ADDS_UP:
        add_up_as_last(row_stats, loss, others, factor, counter, N, BLOCK_B)
