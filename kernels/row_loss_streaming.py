"""Row loss for rows of any width: running statistics over column blocks, then a second read for the gradient."""

import triton
import triton.language as tl

from .softmax import (
    LOWEST,
    exp_at_one,
    label_logit,
    lane_max,
    lane_rescale,
    load_labels,
    row_offset,
    store_row_numbers,
    weights_from_scores,
)


@triton.jit(
    do_not_specialize=[
        "stride_so", "stride_si", "stride_to", "stride_ti", "stride_wk", "stride_wn",
        "N", "S", "C_units", "ignore_index",
    ]
)  # fmt: skip
def row_loss_streaming_fwd_kernel(
    student,  # (N, C)
    teachers,  # K pointers to (N, C)
    target,  # (N,) int64
    given,  # (K, N) fp32 weights, or None
    stats,  # (3 + 3K, N) fp32
    residual,  # (N, C) contiguous, or None
    residual_scale,  # fp32 number, or pointer to one when SCALE_ON_DEVICE
    stride_so, stride_si,
    stride_to, stride_ti,  # K each
    stride_wk, stride_wn,
    N, S, C_units,
    ignore_index,
    temperature, exp2_scale,  # T and log2(e) / T
    hard_weight, soft_weight,
    K: tl.constexpr,
    WEIGHTING: tl.constexpr,
    T_POWER: tl.constexpr,
    SCALE_ON_DEVICE: tl.constexpr,
    TWO_LEVEL: tl.constexpr,
    ALIGN: tl.constexpr,
    DEBUG: tl.constexpr,
    BLOCK_C: tl.constexpr,
    VEC: tl.constexpr,
):  # fmt: skip
    """One row per program, in steps of BLOCK_C columns.

    Each group of VEC adjacent columns, which one thread loads in one access, is a lane with maxima and sums of its own.
    So the loop exchanges nothing between threads, at the price of one more exponential per VEC elements.
    """
    R: tl.constexpr = BLOCK_C // VEC
    n = tl.program_id(0).to(tl.int64)
    C = C_units * ALIGN
    y, kept, inside = load_labels(target, n, n < N, ignore_index, C, DEBUG)
    # An ignored row is not read at all.
    limit_units = tl.where(kept, C_units, 0)
    limit = limit_units * ALIGN

    s_row = student + row_offset(n, S, stride_so, stride_si, ALIGN, TWO_LEVEL)
    s_max = tl.full((R,), LOWEST, tl.float32)
    s_sumT = tl.zeros((R,), tl.float32)
    s_sum1 = tl.zeros((R,), tl.float32)
    z_max, z_sumT, z_sum1, gap, plogp = (), (), (), (), ()
    for _ in tl.static_range(K):
        z_max += (s_max,)
        z_sumT += (s_sumT,)
        z_sum1 += (s_sumT,)
        gap += (s_sumT,)
        plogp += (s_sumT,)

    for start in range(0, limit, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        s = tl.load(s_row + cols, mask=cols < limit, other=float("-inf")).to(tl.float32).reshape(R, VEC)
        s_max, s_drop = lane_max(s_max, s)
        s -= s_max[:, None]
        e = tl.exp2(s * exp2_scale)
        decay = tl.exp2(s_drop * exp2_scale)
        s_sumT = s_sumT * decay + tl.sum(e, axis=1)
        s_sum1 = s_sum1 * exp_at_one(decay, s_drop, T_POWER) + tl.sum(exp_at_one(e, s, T_POWER), axis=1)
        new_max, new_sumT, new_sum1, new_gap, new_plogp = (), (), (), (), ()
        for k in tl.static_range(K):
            z_row = teachers[k] + row_offset(n, S, stride_to[k], stride_ti[k], ALIGN, TWO_LEVEL)
            z = tl.load(z_row + cols, mask=cols < limit, other=float("-inf")).to(tl.float32).reshape(R, VEC)
            lane, drop = lane_max(z_max[k], z)
            z -= lane[:, None]
            e = tl.exp2(z * exp2_scale)
            e1 = exp_at_one(e, z, T_POWER)
            decay = tl.exp2(drop * exp2_scale)
            decay1 = exp_at_one(decay, drop, T_POWER)
            new_max += (lane,)
            new_sumT += (z_sumT[k] * decay + tl.sum(e, axis=1),)
            new_sum1 += (z_sum1[k] * decay1 + tl.sum(e1, axis=1),)
            # The sums so far hold differences to the old maxima of both rows; move them to the new ones.
            moved = lane_rescale(gap[k] + z_sumT[k] * (drop - s_drop), decay)
            new_gap += (moved + tl.sum(tl.where(e > 0, e * (z - s), 0.0), axis=1),)
            if WEIGHTING == "entropy":
                moved = lane_rescale(plogp[k] + z_sum1[k] * drop, decay1)
                new_plogp += (moved + tl.sum(tl.where(e1 > 0, e1 * z, 0.0), axis=1),)
            else:
                new_plogp += (plogp[k],)
        z_max, z_sumT, z_sum1, gap, plogp = new_max, new_sumT, new_sum1, new_gap, new_plogp

    # The lanes of each row become one number.
    s_top = tl.max(s_max, axis=0)
    s_drop = s_max - s_top
    decay = tl.exp2(s_drop * exp2_scale)
    s_totalT = tl.sum(s_sumT * decay, axis=0)
    s_total1 = tl.sum(s_sum1 * exp_at_one(decay, s_drop, T_POWER), axis=0)
    hard = tl.log(s_total1) - (label_logit(s_row, y, kept & inside) - s_top)
    z_top, z_totalT, divergence, ce, scores = (), (), (), (), ()
    for k in tl.static_range(K):
        top = tl.max(z_max[k], axis=0)
        drop = z_max[k] - top
        decay = tl.exp2(drop * exp2_scale)
        decay1 = exp_at_one(decay, drop, T_POWER)
        totalT = tl.sum(z_sumT[k] * decay, axis=0)
        log_sum = tl.sum(z_sum1[k] * decay1, axis=0)
        if WEIGHTING == "entropy":
            spread = tl.sum(lane_rescale(plogp[k] + z_sum1[k] * drop, decay1), axis=0) / log_sum
            # Both terms are positive: no cancellation, and never below 0.
            scores += (tl.log(log_sum) - spread,)
        log_sum = tl.log(log_sum)
        difference = tl.sum(lane_rescale(gap[k] + z_sumT[k] * (drop - s_drop), decay), axis=0)
        z_row = teachers[k] + row_offset(n, S, stride_to[k], stride_ti[k], ALIGN, TWO_LEVEL)
        z_top += (top,)
        z_totalT += (totalT,)
        ce += (log_sum - (label_logit(z_row, y, kept & inside) - top),)
        # One logarithm of the ratio: the difference of two would cancel when student and teacher agree.
        divergence += (difference / (totalT * temperature) + tl.log(s_totalT / totalT),)

    weights = ()
    if WEIGHTING == "confidence":
        weights = weights_from_scores(ce, K, WEIGHTING)
    elif WEIGHTING == "entropy":
        weights = weights_from_scores(scores, K, WEIGHTING)
    elif WEIGHTING == "given":
        for k in tl.static_range(K):
            weights += (tl.load(given + k * stride_wk + n * stride_wn),)
    else:
        for _ in tl.static_range(K):
            weights += (tl.full((), 1.0 / K, tl.float32),)
    weight_sum = store_row_numbers(
        stats, n, N, n < N, kept, inside, hard, divergence, ce, weights, temperature, hard_weight, soft_weight, K
    )

    if residual is not None:
        scale = residual_scale
        if SCALE_ON_DEVICE:
            scale = tl.load(residual_scale)
        blocks = tl.cdiv(C, BLOCK_C)
        for i in range(0, blocks):
            # Backwards: what the first loop read last is what L2 still holds.
            cols = (blocks - 1 - i) * BLOCK_C + tl.arange(0, BLOCK_C)
            s = tl.load(s_row + cols, mask=cols < limit, other=float("-inf")).to(tl.float32) - s_top
            e = tl.exp2(s * exp2_scale)
            mixed = tl.zeros((BLOCK_C,), tl.float32)
            for k in tl.static_range(K):
                z_row = teachers[k] + row_offset(n, S, stride_to[k], stride_ti[k], ALIGN, TWO_LEVEL)
                # A teacher of weight 0 is not read: not even its NaN may count.
                wanted = tl.where(weights[k] == 0, 0, limit_units) * ALIGN
                z = tl.load(z_row + cols, mask=cols < wanted, other=float("-inf")).to(tl.float32) - z_top[k]
                coefficient = tl.where(weights[k] == 0, 0.0, weights[k] / z_totalT[k])
                mixed += tl.exp2(z * exp2_scale) * coefficient
            soft_part = e * (weight_sum / s_totalT) - mixed
            hard_part = exp_at_one(e, s, T_POWER) * (1.0 / s_total1) - tl.where(cols == y, 1.0, 0.0)
            out = (soft_weight * temperature * soft_part + hard_weight * hard_part) * scale
            out = tl.where(inside, out, float("nan"))
            out = tl.where(kept, out, 0.0)
            tl.store(residual + n * C + cols, out.to(residual.dtype.element_ty), mask=cols < C)
