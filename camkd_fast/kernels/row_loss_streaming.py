"""Row loss for rows of any width: running statistics over column blocks, then a second read for the gradient.

Divergences of a mixture are one read more, because the mixture takes the statistics of the whole row.
"""

import triton
import triton.language as tl

from .batch_mean import add_up_as_last, gradient_scale
from .divergences import column_slopes, infinite_gradient, kl_of_sums, soft_gradient
from .lanes import group_lanes, mixture_sums, student_total, teacher_total
from .logit_map import load_logits, map_gradient, mapped_label_distance
from .results import grad_student_terms, store_entropy, store_loss, store_teacher
from .softmax import (
    exp_at_one,
    label_shares,
    load_labels,
    row_offset,
    row_weights,
    stride,
)


@triton.jit
def column_gradient(
    cols, s_row, s_sums, z_rows, z_top, z_totalT, limit_units, weights, weight_sum, centers, labels, formula,
    K: tl.constexpr, WEIGHTING: tl.constexpr, T_POWER: tl.constexpr, DIVERGENCE: tl.constexpr,
    SCALE_BY_T2: tl.constexpr, Z_LOSS: tl.constexpr, MAPS: tl.constexpr, ALIGN: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """d loss / d student of some columns, which are read again."""
    s_top, s_totalT, s_total1, _ = s_sums
    exp2_scale = formula.exp2_scale
    limit = limit_units * ALIGN
    s = load_logits(s_row + cols, formula.maps, 0, MAPS, mask=cols < limit) - s_top
    e = tl.exp2(s * exp2_scale)
    mixed = tl.zeros(cols.shape, tl.float32)
    for k in tl.static_range(K):
        wanted, top = limit, z_top[k]
        coefficient = weights[k] / z_totalT[k] if DIVERGENCE == "forward_kl" else weights[k]
        if WEIGHTING == "given" or WEIGHTING == "min_ce":
            # A teacher of weight 0 is not read, so even its NaN has no effect.
            wanted = tl.where(weights[k] == 0, 0, limit_units) * ALIGN
            top = tl.where(weights[k] == 0, 0.0, top)
            coefficient = tl.where(weights[k] == 0, 0.0, coefficient)
        z = load_logits(z_rows[k] + cols, formula.maps, k + 1, MAPS, mask=cols < wanted) - top
        if DIVERGENCE == "forward_kl":
            mixed += tl.exp2(z * exp2_scale) * coefficient
        else:
            x = column_slopes(e, s, s_totalT, z, z_totalT[k], formula, DIVERGENCE)
            mixed += tl.where(weights[k] == 0, 0.0, coefficient * (x - centers[k]))
    if DIVERGENCE == "forward_kl":
        soft_part = e * (weight_sum / s_totalT) - mixed
    else:
        infinite = infinite_gradient(centers, weights, K)
        soft_part = soft_gradient(e * (1.0 / s_totalT), mixed, infinite, formula, DIVERGENCE)
    softmax = exp_at_one(e, s, T_POWER) * (1.0 / s_total1)
    shares = label_shares(cols, labels, TWO)
    lse = s_top + tl.log(s_total1)
    out = grad_student_terms(softmax, shares, soft_part, lse, formula, SCALE_BY_T2, Z_LOSS)
    return map_gradient(out, s_row + cols, cols < limit, formula.maps, MAPS)


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
    row_stats,  # (3 + 3K, N) fp32, or (4 + 3K, N) with ENTROPY
    grad_student,  # (N, C) contiguous, or None; may be the student's memory with IN_PLACE
    grad_scale,  # fp32 number, or pointer to one if SCALE_ON_DEVICE
    total_scale,  # fp32 number: the factor of the sums over the rows without a mean
    loss, others, counter,  # () fp32, (3,) fp32, (1,) int32; None without sums
    stride_so, stride_si,
    stride_to, stride_ti,  # K each, `unspecialised`
    stride_wk, stride_wn,
    N, S, C_units, ignore_index,
    formula,  # KernelFormula
    WEIGHTING: tl.constexpr, T_POWER: tl.constexpr, DIVERGENCE: tl.constexpr, SCALE_BY_T2: tl.constexpr,
    Z_LOSS: tl.constexpr, ENTROPY: tl.constexpr, MAPS: tl.constexpr,  # formula_constants
    K: tl.constexpr, TWO_LEVEL: tl.constexpr, ALIGN: tl.constexpr,
    SCALE_ON_DEVICE: tl.constexpr, IN_PLACE: tl.constexpr, DEBUG: tl.constexpr,
    INVERSE: tl.constexpr, ADDS_UP: tl.constexpr, BLOCK_B: tl.constexpr,  # BatchLaunch
    BLOCK_C: tl.constexpr, VEC: tl.constexpr, GROUP: tl.constexpr,  # StreamingLaunch
):  # fmt: skip
    """One row per program, BLOCK_C columns per iteration.

    The VEC columns that one thread loads form a lane with its own maximum and sums, so the loop exchanges nothing
    between threads, at the cost of one more exponential per VEC elements. Teachers are processed in groups of GROUP to
    limit registers.
    """
    exp2_scale = formula.exp2_scale
    n = tl.program_id(0).to(tl.int64)
    C = C_units * ALIGN
    TWO: tl.constexpr = second_target is not None
    IS_MIXTURE: tl.constexpr = DIVERGENCE == "jsd" or DIVERGENCE == "skew"
    labels, kept, valid = load_labels(target, second_target, mix, n, n < N, ignore_index, C, DEBUG)
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
    z_top, z_totalT, divergence, scores, ces, centers = (), (), (), (), (), ()
    for first in tl.static_range(0, K, GROUP):
        s_lanes, lanes = group_lanes(
            s_row, z_rows, limit, formula, first, K, T_POWER, WEIGHTING, DIVERGENCE, ENTROPY, MAPS,
            ALIGN, BLOCK_C, VEC, GROUP,
        )  # fmt: skip
        s_sums, s_drop, s_decay = student_total(s_lanes, exp2_scale, T_POWER, ENTROPY)
        s_top, s_totalT, s_total1, s_plogp = s_sums
        moved = (s_drop, s_decay, s_lanes[1])
        for k in tl.static_range(first, first + GROUP):
            if k < K:
                top, totalT, total1, cross, plogp = teacher_total(
                    lanes[k - first], moved, exp2_scale, T_POWER, WEIGHTING, DIVERGENCE
                )
                log_sum = tl.log(total1)
                z_top += (top,)
                z_totalT += (totalT,)
                label = mapped_label_distance(z_rows[k], top, labels, kept & valid, formula.maps, k + 1, MAPS, TWO)
                ce = log_sum - label
                ces += (ce,)
                if DIVERGENCE == "forward_kl":
                    divergence += (kl_of_sums(cross, totalT, s_totalT, formula.temperature),)
                elif DIVERGENCE == "reverse_kl":
                    divergence += (kl_of_sums(cross, s_totalT, totalT, formula.temperature),)
                    centers += (cross / s_totalT,)
                if not IS_MIXTURE:
                    store_teacher(row_stats, k, N, n, divergence[k], ce, kept, n < N, K)
                if WEIGHTING == "entropy":
                    # Both terms are positive: no cancellation, never below 0.
                    scores += (log_sum - plogp / total1,)
                else:
                    scores += (ce,)
    s_log_sum = tl.log(s_total1)
    lse = s_top + s_log_sum
    hard = s_log_sum - mapped_label_distance(s_row, s_top, labels, kept & valid, formula.maps, 0, MAPS, TWO)
    if ENTROPY:
        store_entropy(row_stats, N, n, s_totalT, s_plogp, kept, n < N, formula, K)

    # Another read: divergences of a mixture
    if IS_MIXTURE:
        divergence, centers = mixture_sums(
            s_row, s_top, s_totalT, z_rows, z_top, z_totalT, limit, formula,
            K, DIVERGENCE, MAPS, ALIGN, BLOCK_C, VEC, GROUP,
        )  # fmt: skip
        for k in tl.static_range(K):
            store_teacher(row_stats, k, N, n, divergence[k], ces[k], kept, n < N, K)

    # Weights and row_stats
    weights = row_weights(scores, given, stride_wk, stride_wn, n, K, WEIGHTING)
    weight_sum = store_loss(
        row_stats, N, n, hard, lse, divergence, weights, kept, valid, n < N, formula, K, SCALE_BY_T2, Z_LOSS
    )

    # Last read: the gradient
    if grad_student is not None:
        if IN_PLACE:
            # Threads of this program may not have read the logit at the label.
            tl.debug_barrier()
        blocks = tl.cdiv(C, BLOCK_C)
        for i in range(blocks):
            # In the other direction than the last loop: the columns that it read last are the ones in L2.
            cols = (i if IS_MIXTURE else blocks - 1 - i) * BLOCK_C + tl.arange(0, BLOCK_C)
            out = column_gradient(
                cols, s_row, s_sums, z_rows, z_top, z_totalT, limit_units, weights, weight_sum, centers, labels,
                formula, K, WEIGHTING, T_POWER, DIVERGENCE, SCALE_BY_T2, Z_LOSS, MAPS, ALIGN, TWO,
            )  # fmt: skip
            out = tl.where(valid, out * scale, float("nan"))
            out = tl.where(kept, out, 0.0)
            tl.store(grad_student + n * C + cols, out.to(grad_student.dtype.element_ty), mask=cols < C)
    if ADDS_UP:
        add_up_as_last(row_stats, loss, others, factor, counter, N, BLOCK_B)
