"""The row loss of rows of which some of the columns are here: sums over these, and results from the sums of whole rows.

Contracts: `camkd_fast.backends.contract.ShardBackend`; what is summed up: `camkd_fast.backends.row_sums`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl
from torch import Tensor

from ..backends import contract
from ..backends.contract import RowLossResult, new_row_outputs
from .divergences import kl_of_sums
from .lanes import group_lanes, mixture_sums, student_total, teacher_total
from .launch_table import streaming_launch
from .launcher import Launcher
from .layout import Layout, alignment, layouts, row_shape, stride_units, unspecialised
from .logit_map import mapped_label_distance
from .results import formula_constants, kernel_formula, store_entropy, store_loss, store_teacher, sums_constants
from .row_loss_streaming import column_gradient
from .softmax import load_labels, row_offset, row_weights, stride

if TYPE_CHECKING:
    from ..losses.formula import Formula

# Rows of the sums of a stream, (ROW_SUMS, N).
MAX, SUM_T, SUM_1 = tl.constexpr(contract.MAX), tl.constexpr(contract.SUM_T), tl.constexpr(contract.SUM_1)
CROSS, PLOGP, LABEL = tl.constexpr(contract.CROSS), tl.constexpr(contract.PLOGP), tl.constexpr(contract.LABEL)
CENTER, ROW_SUMS = tl.constexpr(contract.CENTER), tl.constexpr(contract.ROW_SUMS)


def row_sums(
    student: Tensor, teachers: Sequence[Tensor], target: Tensor, formula: Formula, whole: Tensor | None = None
) -> Tensor:
    """See `contract.ShardBackend`."""
    K, N = len(teachers), target.shape[0]
    sums = contract.new_row_sums(whole, K, target)
    if N > 0:
        launch = sums_launcher(layouts([student, *teachers]), _summed(formula), whole is not None)
        launch(student, tuple(teachers), target, sums)
    return sums


def row_results(
    student: Tensor,
    teachers: Sequence[Tensor],
    target: Tensor,
    formula: Formula,
    sums: Tensor,
    *,
    needs_grad: bool,
    grad_scale: float | Tensor = 1.0,
    out: Tensor | None = None,
) -> RowLossResult:
    """See `contract.ShardBackend`."""
    row_stats, grad_student = new_row_outputs(student, len(teachers), formula, needs_grad, out)
    if target.shape[0] > 0:
        given = formula.weighting if isinstance(formula.weighting, Tensor) else None
        scale = grad_scale if isinstance(grad_scale, Tensor) else float(grad_scale)
        strides = (0, 0) if given is None else given.stride()
        launch = results_launcher(layouts([student, *teachers]), strides, _named(formula), isinstance(scale, Tensor))
        launch(student, tuple(teachers), target, given, sums.contiguous(), row_stats, grad_student, scale)
    return RowLossResult(row_stats, grad_student)


def _named(formula: Formula) -> Formula:
    """With a name for its weighting."""
    return formula.replaced(weighting=formula.weighting_name())


def _summed(formula: Formula) -> Formula:
    """With the defaults of what the sums do not depend on, so that formulas that differ only in it share a launcher."""
    weighting = "entropy" if formula.weighting_name() == "entropy" else "uniform"
    return formula.replaced(weighting=weighting, hard_weight=1.0, soft_weight=1.0, scale_by_t2=True, z_loss_weight=0.0)


@functools.lru_cache(maxsize=1024)
def sums_launcher(tensors: tuple[Any, ...], formula: Formula, of_mixtures: bool) -> Launcher:
    """
    Args:
        tensors: `layouts` of student and teachers.
        formula: `_summed`.
    """
    constants = sums_constants(formula, len(tensors) - 1)
    return _launcher(row_sums_kernel, tensors, (), formula, {**constants, "OF_MIXTURES": of_mixtures})


@functools.lru_cache(maxsize=1024)
def results_launcher(
    tensors: tuple[Any, ...], given_strides: tuple[int, ...], formula: Formula, scale_on_device: bool
) -> Launcher:
    """Likewise, for a formula with a name for its weighting; `given_strides` are those of given weights, or zeros."""
    constants = formula_constants(formula, len(tensors) - 1)
    constants["SCALE_ON_DEVICE"] = scale_on_device
    return _launcher(row_results_kernel, tensors, given_strides, formula, constants)


def _launcher(
    kernel: Any,
    tensors: tuple[Any, ...],
    given_strides: tuple[int, ...],
    formula: Formula,
    constants: Mapping[str, Any],
) -> Launcher:
    """A program per row. `constants`: those of the kernel besides the sizes."""
    tensors = tuple(Layout(*x) for x in tensors)
    N, S, C = row_shape(tensors[0].shape)
    K, ALIGN = len(tensors) - 1, alignment(tensors)
    outer, inner = stride_units(tensors, ALIGN)
    numbers = (
        *(outer[0], inner[0], unspecialised(outer[1:]), unspecialised(inner[1:])),
        *given_strides,
        *(N, S, C // ALIGN, formula.ignore_index),
        kernel_formula(formula, K),
    )
    itemsize = max(x.dtype.itemsize for x in tensors)
    BLOCK_C, VEC, GROUP, num_warps, maxnreg = streaming_launch(K, C, itemsize, ALIGN, beyond=True)
    sizes = {
        "K": K,
        "TWO_LEVEL": len(tensors[0].shape) == 3,
        "ALIGN": ALIGN,
        "BLOCK_C": BLOCK_C,
        "VEC": VEC,
        "GROUP": GROUP,
    }
    return Launcher(kernel, N, numbers, {**sizes, **constants}, num_warps=num_warps, maxnreg=maxnreg)


@triton.jit
def at(sums, k, i, N, n):
    """The address of sum i of stream k in row n."""
    return sums + (k * ROW_SUMS + i) * tl.cast(N, tl.int64) + n


@triton.jit
def load_sums(sums, N, n, K: tl.constexpr):
    """Of the student: max, sumT, sum1; then tuples of the maxima and sumT of K teachers."""
    s_sums = tl.load(at(sums, 0, MAX, N, n)), tl.load(at(sums, 0, SUM_T, N, n)), tl.load(at(sums, 0, SUM_1, N, n))
    z_top, z_totalT = (), ()
    for k in tl.static_range(K):
        z_top += (tl.load(at(sums, k + 1, MAX, N, n)),)
        z_totalT += (tl.load(at(sums, k + 1, SUM_T, N, n)),)
    return s_sums, z_top, z_totalT


@triton.jit(do_not_specialize=["stride_so", "stride_si", "N", "S", "C_units", "ignore_index"])
def row_sums_kernel(
    student,  # (N, C)
    teachers,  # K pointers to (N, C)
    target,  # (N,) int64
    sums,  # (K + 1, ROW_SUMS, N) fp32, of whole rows on entry if OF_MIXTURES
    stride_so, stride_si,
    stride_to, stride_ti,  # K each, `unspecialised`
    N, S, C_units, ignore_index,
    formula,  # KernelFormula
    K: tl.constexpr, WEIGHTING: tl.constexpr, T_POWER: tl.constexpr, DIVERGENCE: tl.constexpr,
    ENTROPY: tl.constexpr, MAPS: tl.constexpr,
    TWO_LEVEL: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr, VEC: tl.constexpr, GROUP: tl.constexpr,  # StreamingLaunch
    OF_MIXTURES: tl.constexpr,
):  # fmt: skip
    """One row per program: its sums, or those over the mixtures of jsd and skew."""
    exp2_scale = formula.exp2_scale
    n = tl.program_id(0).to(tl.int64)
    C = C_units * ALIGN
    labels, kept, valid = load_labels(target, None, None, n, n < N, ignore_index, C, False)
    limit = tl.where(kept, C_units, 0) * ALIGN
    s_row = student + row_offset(n, S, stride_so, stride_si, ALIGN, TWO_LEVEL)
    z_rows = ()
    for k in tl.static_range(K):
        z_rows += (teachers[k] + row_offset(n, S, stride(stride_to[k]), stride(stride_ti[k]), ALIGN, TWO_LEVEL),)
    if OF_MIXTURES:
        s_sums, z_top, z_totalT = load_sums(sums, N, n, K)
        divergence, centers = mixture_sums(
            s_row, s_sums[0], s_sums[1], z_rows, z_top, z_totalT, limit, formula,
            K, DIVERGENCE, MAPS, ALIGN, BLOCK_C, VEC, GROUP,
        )  # fmt: skip
        for k in tl.static_range(K):
            tl.store(at(sums, k + 1, CROSS, N, n), divergence[k])
            tl.store(at(sums, k + 1, CENTER, N, n), centers[k])
    else:
        for first in tl.static_range(0, K, GROUP):
            s_lanes, lanes = group_lanes(
                s_row, z_rows, limit, formula, first, K, T_POWER, WEIGHTING, DIVERGENCE, ENTROPY, MAPS,
                ALIGN, BLOCK_C, VEC, GROUP,
            )  # fmt: skip
            s_sums, s_drop, s_decay = student_total(s_lanes, exp2_scale, T_POWER, ENTROPY)
            moved = (s_drop, s_decay, s_lanes[1])
            for k in tl.static_range(first, first + GROUP):
                if k < K:
                    top, totalT, total1, cross, plogp = teacher_total(
                        lanes[k - first], moved, exp2_scale, T_POWER, WEIGHTING, DIVERGENCE
                    )
                    label = mapped_label_distance(
                        z_rows[k], top, labels, kept & valid, formula.maps, k + 1, MAPS, False
                    )
                    store_sums(sums, k + 1, N, n, top, totalT, total1, cross, plogp, label)
        s_top, s_totalT, s_total1, s_plogp = s_sums
        label = mapped_label_distance(s_row, s_top, labels, kept & valid, formula.maps, 0, MAPS, False)
        store_sums(sums, 0, N, n, s_top, s_totalT, s_total1, 0.0, s_plogp, label)


@triton.jit
def store_sums(sums, k, N, n, top, totalT, total1, cross, plogp, label):
    tl.store(at(sums, k, MAX, N, n), top)
    tl.store(at(sums, k, SUM_T, N, n), totalT)
    tl.store(at(sums, k, SUM_1, N, n), total1)
    tl.store(at(sums, k, CROSS, N, n), cross)
    tl.store(at(sums, k, PLOGP, N, n), plogp)
    tl.store(at(sums, k, LABEL, N, n), label)
    tl.store(at(sums, k, CENTER, N, n), 0.0)


@triton.jit(
    do_not_specialize=["stride_so", "stride_si", "stride_wk", "stride_wn", "N", "S", "C_units", "ignore_index"]
)  # fmt: skip
def row_results_kernel(
    student,  # (N, C)
    teachers,  # K pointers to (N, C)
    target,  # (N,) int64
    given,  # (K, N) fp32 weights, or None
    sums,  # (K + 1, ROW_SUMS, N) fp32, of whole rows
    row_stats,  # (3 + 3K, N) fp32, or (4 + 3K, N) with ENTROPY
    grad_student,  # (N, C) contiguous, or None; may be the student's memory
    grad_scale,  # fp32 number, or pointer to one if SCALE_ON_DEVICE
    stride_so, stride_si,
    stride_to, stride_ti,  # K each, `unspecialised`
    stride_wk, stride_wn,
    N, S, C_units, ignore_index,
    formula,  # KernelFormula
    K: tl.constexpr, WEIGHTING: tl.constexpr, T_POWER: tl.constexpr, DIVERGENCE: tl.constexpr,
    SCALE_BY_T2: tl.constexpr, Z_LOSS: tl.constexpr, ENTROPY: tl.constexpr, MAPS: tl.constexpr,
    TWO_LEVEL: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr, VEC: tl.constexpr, GROUP: tl.constexpr,  # StreamingLaunch
    SCALE_ON_DEVICE: tl.constexpr,
):  # fmt: skip
    """One row per program: its numbers from the sums, and the gradient of the columns that are here."""
    n = tl.program_id(0).to(tl.int64)
    C = C_units * ALIGN
    labels, kept, _ = load_labels(target, None, None, n, n < N, ignore_index, C, False)
    s_row = student + row_offset(n, S, stride_so, stride_si, ALIGN, TWO_LEVEL)
    z_rows = ()
    for k in tl.static_range(K):
        z_rows += (teachers[k] + row_offset(n, S, stride(stride_to[k]), stride(stride_ti[k]), ALIGN, TWO_LEVEL),)

    # Weights and row_stats
    s_sums, z_top, z_totalT = load_sums(sums, N, n, K)
    s_top, s_totalT, s_total1 = s_sums
    s_plogp = tl.load(at(sums, 0, PLOGP, N, n))
    s_label = tl.load(at(sums, 0, LABEL, N, n))
    valid = s_label == s_label
    divergence, scores, centers = (), (), ()
    for k in tl.static_range(K):
        cross = tl.load(at(sums, k + 1, CROSS, N, n))
        total1 = tl.load(at(sums, k + 1, SUM_1, N, n))
        log_sum = tl.log(total1)
        ce = log_sum - tl.load(at(sums, k + 1, LABEL, N, n))
        if DIVERGENCE == "forward_kl":
            divergence += (kl_of_sums(cross, z_totalT[k], s_totalT, formula.temperature),)
        elif DIVERGENCE == "reverse_kl":
            divergence += (kl_of_sums(cross, s_totalT, z_totalT[k], formula.temperature),)
            centers += (cross / s_totalT,)
        else:
            divergence += (cross,)
            centers += (tl.load(at(sums, k + 1, CENTER, N, n)),)
        store_teacher(row_stats, k, N, n, divergence[k], ce, kept, n < N, K)
        if WEIGHTING == "entropy":
            scores += (log_sum - tl.load(at(sums, k + 1, PLOGP, N, n)) / total1,)
        else:
            scores += (ce,)
    s_log_sum = tl.log(s_total1)
    if ENTROPY:
        store_entropy(row_stats, N, n, s_totalT, s_plogp, kept, n < N, formula, K)
    weights = row_weights(scores, given, stride_wk, stride_wn, n, K, WEIGHTING)
    weight_sum = store_loss(
        row_stats, N, n, s_log_sum - s_label, s_top + s_log_sum, divergence, weights, kept, valid, n < N, formula,
        K, SCALE_BY_T2, Z_LOSS,
    )  # fmt: skip

    # The gradient
    if grad_student is not None:
        scale = tl.load(grad_scale) if SCALE_ON_DEVICE else grad_scale
        limit_units = tl.where(kept, C_units, 0)
        for start in range(0, C, BLOCK_C):
            cols = start + tl.arange(0, BLOCK_C)
            out = column_gradient(
                cols, s_row, (s_top, s_totalT, s_total1, s_plogp), z_rows, z_top, z_totalT, limit_units, weights,
                weight_sum, centers, labels, formula,
                K, WEIGHTING, T_POWER, DIVERGENCE, SCALE_BY_T2, Z_LOSS, MAPS, ALIGN, False,
            )  # fmt: skip
            out = tl.where(valid, out * scale, float("nan"))
            out = tl.where(kept, out, 0.0)
            tl.store(grad_student + n * C + cols, out.to(grad_student.dtype.element_ty), mask=cols < C)
