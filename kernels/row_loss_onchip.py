"""Row loss for rows that fit in one program: statistics and gradient from one read of the logits."""

import triton
import triton.language as tl

from .batch_mean import add_up_as_last, gradient_scale
from .results import grad_student_terms, store_loss, store_teacher
from .softmax import (
    exp_at_one,
    finite_max,
    label_distance,
    label_logits,
    label_shares,
    load_labels,
    relative_share,
    row_offset,
    stride,
    weights_from_scores,
)


@triton.jit(
    do_not_specialize=[
        "stride_so", "stride_si", "stride_wk", "stride_wn",
        "N", "S", "C_units", "ignore_index",
    ]
)  # fmt: skip
def row_loss_onchip_fwd_kernel(
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
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,  # RowLaunch
):  # fmt: skip
    """BLOCK_N whole rows of all K + 1 tensors per program.

    The weights depend on every teacher's statistics, and K tiles of exponentials kept until then would cost K tiles of
    registers. Two are enough: let e_k be the rescaled shares of `relative_share`; then w_k is proportional to
    sum_{j != k} e_j, so `mixed` = sum_k p_k sum_{j != k} e_j can be accumulated teacher by teacher from `mixed`,
    `unweighted` = sum_k p_k, and the running total of the e_k. All terms are positive, so nothing cancels.
    """
    exp2_scale = formula.exp2_scale
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_range = n < N
    cols = tl.arange(0, BLOCK_C)
    C = C_units * ALIGN
    tile = in_range[:, None] & (cols < C)[None, :]
    TWO: tl.constexpr = second_target is not None
    labels, kept, inside = load_labels(target, second_target, mix, n, in_range, ignore_index, C, DEBUG)

    # Student: load, statistics
    s_row = student + row_offset(n, S, stride_so, stride_si, ALIGN, TWO_LEVEL)
    s = tl.load(s_row[:, None] + cols[None, :], mask=tile, other=float("-inf"))
    # Here, because the labels arrive while the program waits for the student.
    scale, factor = gradient_scale(
        grad_scale, total_scale, others, target, N, ignore_index, SCALE_ON_DEVICE, INVERSE, BLOCK_B
    )
    s = s.to(tl.float32)
    s_label = label_logits(s_row, labels, kept & inside, TWO)
    s_max = finite_max(s)
    s -= s_max[:, None]
    e = tl.exp2(s * exp2_scale)
    s_sumT = tl.sum(e, axis=1)
    s_sum1 = tl.sum(exp_at_one(e, s, T_POWER), axis=1)
    hard = tl.log(s_sum1) - label_distance(s_label, s_max, labels, TWO)

    # Teachers: load, statistics, mixture
    divergence, scores, weights = (), (), ()
    mixed = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    unweighted = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    top = tl.full((BLOCK_N,), float("-inf") if WEIGHTING == "confidence" else 0.0, tl.float32)
    for k in tl.static_range(K):
        z_row = teachers[k] + row_offset(n, S, stride(stride_to[k]), stride(stride_ti[k]), ALIGN, TWO_LEVEL)
        z = tl.load(z_row[:, None] + cols[None, :], mask=tile, other=float("-inf")).to(tl.float32)
        z_label = label_logits(z_row, labels, kept & inside, TWO)
        z_max = finite_max(z)
        z -= z_max[:, None]
        e = tl.exp2(z * exp2_scale)
        z_sumT = tl.sum(e, axis=1)
        e1 = exp_at_one(e, z, T_POWER)
        z_sum1 = tl.sum(e1, axis=1)
        cross = tl.sum(tl.where(e > 0, e * (z - s), 0.0), axis=1)
        # One logarithm of the ratio: a difference of two would cancel when student and teacher agree.
        kl = cross / (z_sumT * formula.temperature) + tl.log(s_sumT / z_sumT)
        log_sum = tl.log(z_sum1)
        ce = log_sum - label_distance(z_label, z_max, labels, TWO)
        store_teacher(row_stats, k, N, n, kl, ce, kept, in_range, K)
        divergence += (kl,)
        inverse = 1.0 / z_sumT
        if WEIGHTING == "confidence" or WEIGHTING == "entropy":
            if WEIGHTING == "confidence":
                score = ce
            else:
                # Both terms are positive: no cancellation, never below 0.
                score = log_sum - tl.sum(tl.where(e1 > 0, e1 * z, 0.0), axis=1) / z_sum1
            scores += (score,)
            if grad_student is not None:
                new_top = tl.maximum(top, score)
                decay = relative_share(top, new_top, WEIGHTING)
                share = relative_share(score, new_top, WEIGHTING)
                mixed = mixed * decay[:, None] + unweighted * share[:, None] + e * (total * decay * inverse)[:, None]
                unweighted += e * inverse[:, None]
                total = total * decay + share
                top = new_top
        else:
            if WEIGHTING == "given":
                weight = tl.load(given + k * stride_wk + n * stride_wn, mask=in_range, other=0.0)
            else:
                weight = tl.full((BLOCK_N,), 1.0 / K, tl.float32)
            weights += (weight,)
            if grad_student is not None:
                # A weight of 0 removes even a NaN.
                mixed += tl.where((weight == 0)[:, None], 0.0, e * (weight * inverse)[:, None])

    # Weights and row_stats
    if WEIGHTING == "confidence" or WEIGHTING == "entropy":
        weights = weights_from_scores(scores, K, WEIGHTING)
    weight_sum = store_loss(row_stats, N, n, hard, divergence, weights, kept, inside, in_range, formula, K)
    # Write the gradient
    if grad_student is not None:
        if WEIGHTING == "confidence":
            mixed *= (1.0 / (total * (K - 1)))[:, None]
        elif WEIGHTING == "entropy":
            mixed *= (1.0 / total)[:, None]
        e = tl.exp2(s * exp2_scale)
        soft_part = e * (weight_sum / s_sumT)[:, None] - mixed
        hard_part = exp_at_one(e, s, T_POWER) * (1.0 / s_sum1)[:, None]
        y, second, share = labels
        hard_part -= label_shares(cols[None, :], (y[:, None], second[:, None], share[:, None]), TWO)
        out = grad_student_terms(hard_part, soft_part, formula) * scale
        out = tl.where(inside[:, None], out, float("nan"))
        out = tl.where(kept[:, None], out, 0.0)
        pointers = grad_student + n[:, None] * C + cols[None, :]
        tl.store(pointers, out.to(grad_student.dtype.element_ty), mask=tile)
    if ADDS_UP:
        add_up_as_last(row_stats, loss, others, factor, counter, N, BLOCK_B)
