"""Row loss for rows that fit in one program: statistics and gradient from one read of the logits."""

import triton
import triton.language as tl

from .batch_mean import add_up_as_last, gradient_scale
from .divergences import infinite_gradient, kl_of_sums, onchip_divergence, soft_gradient
from .logit_map import load_logits, map_gradient, mapped, mapped_labels, masked
from .results import grad_student_terms, store_entropy, store_loss, store_teacher
from .softmax import (
    exp_at_one,
    finite_max,
    label_distance,
    label_shares,
    load_labels,
    lower,
    relative_mass,
    row_offset,
    stride,
    weights_from_scores,
    weights_of_lowest,
)


@triton.jit
def mix_in(mixed, unweighted, total, top, part, inverse, score, WEIGHTING: tl.constexpr):
    """The tiles and totals of the kernel's docstring with those of one more teacher, `part` * `inverse`."""
    new_top = tl.maximum(top, score)
    decay = relative_mass(top, new_top, WEIGHTING)
    mass = relative_mass(score, new_top, WEIGHTING)
    mixed = mixed * decay[:, None] + unweighted * mass[:, None] + part * (total * decay * inverse)[:, None]
    unweighted += part * inverse[:, None]
    return mixed, unweighted, total * decay + mass, new_top


@triton.jit
def keep_lowest(mixed, lowest, part, inverse, ce, k: tl.constexpr):
    """`mixed` and its cross-entropy for "min_ce": those of teacher k if it is the first or lower than the others."""
    if k == 0:
        return part * inverse[:, None], ce
    else:
        return tl.where((ce < lowest)[:, None], part * inverse[:, None], mixed), lower(ce, lowest)


@triton.jit
def normalised(mixed, total, lowest, K: tl.constexpr, WEIGHTING: tl.constexpr):
    """`mixed` by the teachers' weights, which `weights_from_scores` and `weights_of_lowest` return too."""
    if WEIGHTING == "confidence":
        return mixed * (1.0 / (total * (K - 1)))[:, None]
    elif WEIGHTING == "entropy":
        return mixed * (1.0 / total)[:, None]
    elif WEIGHTING == "min_ce":
        return tl.where((lowest == lowest)[:, None], mixed, lowest[:, None])
    else:
        return mixed


@triton.jit
def tile_gradient(
    s, s_sumT, s_sum1, lse, mixed, weights, weight_sum, centers, cols, labels, formula,
    K: tl.constexpr, T_POWER: tl.constexpr, DIVERGENCE: tl.constexpr,
    SCALE_BY_T2: tl.constexpr, Z_LOSS: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """The gradient by the student's logits, from the weighted mixture of the teachers."""
    e = tl.exp2(s * formula.exp2_scale)
    if DIVERGENCE == "forward_kl":
        soft_part = e * (weight_sum / s_sumT)[:, None] - mixed
    else:
        infinite = infinite_gradient(centers, weights, K)
        soft_part = soft_gradient(e * (1.0 / s_sumT)[:, None], mixed, infinite[:, None], formula, DIVERGENCE)
    softmax = exp_at_one(e, s, T_POWER) * (1.0 / s_sum1)[:, None]
    y, second, share = labels
    shares = label_shares(cols[None, :], (y[:, None], second[:, None], share[:, None]), TWO)
    return grad_student_terms(softmax, shares, soft_part, lse[:, None], formula, SCALE_BY_T2, Z_LOSS)


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
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,  # RowLaunch
):  # fmt: skip
    """BLOCK_N whole rows of all K + 1 tensors per program.

    The weights depend on every teacher's statistics, and K tiles of exponentials kept until then would cost K tiles of
    registers. Two are enough: let e_k be the rescaled masses of `relative_mass`; then w_k is proportional to
    sum_{j != k} e_j, so `mixed` = sum_k p_k sum_{j != k} e_j can be accumulated teacher by teacher from `mixed`,
    `unweighted` = sum_k p_k, and the running total of the e_k. All terms are positive, so nothing cancels. For other
    divergences than the forward KL the tile x_k - center_k of `divergences` takes the place of p_k, and for "min_ce"
    `mixed` is the tile of the first of the lowest cross-entropies so far.
    """
    exp2_scale = formula.exp2_scale
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_range = n < N
    cols = tl.arange(0, BLOCK_C)
    C = C_units * ALIGN
    tile = in_range[:, None] & (cols < C)[None, :]
    TWO: tl.constexpr = second_target is not None
    labels, kept, valid = load_labels(target, second_target, mix, n, in_range, ignore_index, C, DEBUG)

    # Student: load, statistics
    s_row = student + row_offset(n, S, stride_so, stride_si, ALIGN, TWO_LEVEL)
    s = tl.load(s_row[:, None] + cols[None, :], mask=tile, other=float("-inf"))
    # Here, because the labels arrive while the program waits for the student.
    scale, factor = gradient_scale(
        grad_scale, total_scale, others, target, N, ignore_index, SCALE_ON_DEVICE, INVERSE, BLOCK_B
    )
    s = masked(mapped(s.to(tl.float32), formula.maps, 0, MAPS), tile, 0, MAPS)
    s_label = mapped_labels(s_row, labels, kept & valid, formula.maps, 0, MAPS, TWO)
    s_max = finite_max(s)
    s -= s_max[:, None]
    e_s = tl.exp2(s * exp2_scale)
    s_sumT = tl.sum(e_s, axis=1)
    s_sum1 = tl.sum(exp_at_one(e_s, s, T_POWER), axis=1)
    s_log_sum = tl.log(s_sum1)
    hard = s_log_sum - label_distance(s_label, s_max, labels, TWO)
    if ENTROPY:
        plogp = tl.sum(tl.where(e_s > 0, e_s * s, 0.0), axis=1)
        store_entropy(row_stats, N, n, s_sumT, plogp, kept, in_range, formula, K)

    # Teachers: load, statistics, mixture
    divergence, scores, weights, centers = (), (), (), ()
    mixed = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    unweighted = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    top = tl.full((BLOCK_N,), float("-inf") if WEIGHTING == "confidence" else 0.0, tl.float32)
    lowest = top
    for k in tl.static_range(K):
        z_row = teachers[k] + row_offset(n, S, stride(stride_to[k]), stride(stride_ti[k]), ALIGN, TWO_LEVEL)
        z = load_logits(z_row[:, None] + cols[None, :], formula.maps, k + 1, MAPS, mask=tile)
        z_label = mapped_labels(z_row, labels, kept & valid, formula.maps, k + 1, MAPS, TWO)
        z_max = finite_max(z)
        z -= z_max[:, None]
        e = tl.exp2(z * exp2_scale)
        z_sumT = tl.sum(e, axis=1)
        e1 = exp_at_one(e, z, T_POWER)
        z_sum1 = tl.sum(e1, axis=1)
        if DIVERGENCE == "forward_kl":
            cross = tl.sum(tl.where(e > 0, e * (z - s), 0.0), axis=1)
            d = kl_of_sums(cross, z_sumT, s_sumT, formula.temperature)
            part = e
        else:
            d, center, part = onchip_divergence(e_s, s, s_sumT, e, z, z_sumT, formula, DIVERGENCE)
            centers += (center,)
        log_sum = tl.log(z_sum1)
        ce = log_sum - label_distance(z_label, z_max, labels, TWO)
        store_teacher(row_stats, k, N, n, d, ce, kept, in_range, K)
        divergence += (d,)
        inverse = 1.0 / z_sumT if DIVERGENCE == "forward_kl" else tl.full((BLOCK_N,), 1.0, tl.float32)
        if WEIGHTING == "confidence" or WEIGHTING == "entropy":
            if WEIGHTING == "confidence":
                score = ce
            else:
                # Both terms are positive: no cancellation, never below 0.
                score = log_sum - tl.sum(tl.where(e1 > 0, e1 * z, 0.0), axis=1) / z_sum1
            scores += (score,)
            if grad_student is not None:
                mixed, unweighted, total, top = mix_in(mixed, unweighted, total, top, part, inverse, score, WEIGHTING)
        elif WEIGHTING == "min_ce":
            scores += (ce,)
            if grad_student is not None:
                mixed, lowest = keep_lowest(mixed, lowest, part, inverse, ce, k)
        else:
            if WEIGHTING == "given":
                weight = tl.load(given + k * stride_wk + n * stride_wn, mask=in_range, other=0.0)
            else:
                weight = tl.full((BLOCK_N,), 1.0 / K, tl.float32)
            weights += (weight,)
            if grad_student is not None:
                # A weight of 0 removes even a NaN.
                mixed += tl.where((weight == 0)[:, None], 0.0, part * (weight * inverse)[:, None])

    # Weights and row_stats
    if WEIGHTING == "confidence" or WEIGHTING == "entropy":
        weights = weights_from_scores(scores, K, WEIGHTING)
    elif WEIGHTING == "min_ce":
        weights = weights_of_lowest(scores, K)
    lse = s_max + s_log_sum
    weight_sum = store_loss(
        row_stats, N, n, hard, lse, divergence, weights, kept, valid, in_range, formula, K, SCALE_BY_T2, Z_LOSS
    )
    # Write the gradient
    if grad_student is not None:
        mixed = normalised(mixed, total, lowest, K, WEIGHTING)
        out = tile_gradient(
            s, s_sumT, s_sum1, lse, mixed, weights, weight_sum, centers, cols, labels, formula,
            K, T_POWER, DIVERGENCE, SCALE_BY_T2, Z_LOSS, TWO,
        )  # fmt: skip
        out = map_gradient(out, s_row[:, None] + cols[None, :], tile, formula.maps, MAPS) * scale
        out = tl.where(valid[:, None], out, float("nan"))
        out = tl.where(kept[:, None], out, 0.0)
        if IN_PLACE:
            # Threads of this program may not have read the label's logit of their rows.
            tl.debug_barrier()
        pointers = grad_student + n[:, None] * C + cols[None, :]
        tl.store(pointers, out.to(grad_student.dtype.element_ty), mask=tile)
    if ADDS_UP:
        add_up_as_last(row_stats, loss, others, factor, counter, N, BLOCK_B)
