"""`row_loss`: every row's numbers and the gradient in one launch, the mean of a small batch included."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backends.contract import DEBUG, RowLossResult, SecondLabels, new_row_outputs, second_pair
from .batch_mean import add_up_by_torch, add_up_rows, count_by_torch, count_rows
from .counters import counter_for
from .launch_table import BATCH_ROWS, BatchLaunch, batch_launch, on_chip, onchip_launch, streaming_launch
from .launcher import Launcher
from .layout import Layout, alignment, layouts, row_shape, stride_units, unspecialised
from .results import formula_constants, kernel_formula
from .row_loss_onchip import row_loss_onchip_fwd_kernel
from .row_loss_streaming import row_loss_streaming_fwd_kernel

if TYPE_CHECKING:
    from ..losses.formula import Formula


def row_loss(
    student: Tensor,
    teachers: Sequence[Tensor],
    target: Tensor,
    formula: Formula,
    *,
    needs_grad: bool,
    grad_scale: float | Tensor = 1.0,
    mean: bool = False,
    total_scale: float | None = None,
    second: SecondLabels | None = None,
    out: Tensor | None = None,
) -> RowLossResult:
    """See `contract.Backend`. fp32, bf16 and fp16 logits; dtypes and strides may differ between tensors."""
    device, N = student.device, target.shape[0]
    scale = grad_scale if isinstance(grad_scale, Tensor) else float(grad_scale)
    if mean and not 0 < N <= BATCH_ROWS:
        inverse = count_by_torch(target, formula.ignore_index)
        options: dict[str, Any] = {
            "needs_grad": needs_grad,
            "grad_scale": inverse * scale,
            "second": second,
            "out": out,
        }
        rows = row_loss(student, teachers, target, formula, **options)
        return replace(rows, means=add_up_by_torch(rows.row_stats, inverse))
    row_stats, grad_student = new_row_outputs(student, len(teachers), formula, needs_grad, out)
    if N == 0:
        return RowLossResult(row_stats, grad_student)
    given = formula.weighting if isinstance(formula.weighting, Tensor) else None
    if given is not None:
        formula = formula.replaced(weighting="given")
    launch, batch = row_launcher(
        *(layouts([student, *teachers]), (0, 0) if given is None else given.stride(), formula),
        *(isinstance(scale, Tensor), mean, total_scale is not None, second is not None, out is not None),
    )
    loss = others = counter = None
    if mean or batch.ADDS_UP:
        # Separate memory, since a caller may write to the loss.
        loss = torch.empty((), dtype=torch.float32, device=device)
        others = torch.empty(3, dtype=torch.float32, device=device)
        if batch.INVERSE == "before":
            count_rows(target, formula.ignore_index, others[2:])
        if batch.ADDS_UP:
            counter = counter_for(student)
    factor = 1.0 if total_scale is None else float(total_scale)
    launch(
        *(student, tuple(teachers), target, *second_pair(second), given, row_stats, grad_student),
        *(scale, factor, loss, others, counter),
    )
    if loss is None or others is None:
        return RowLossResult(row_stats, grad_student)
    if not batch.ADDS_UP:
        add_up_rows(row_stats, loss, others)
    return RowLossResult(row_stats, grad_student, None, (loss, others))


@functools.lru_cache(maxsize=1024)
def row_launcher(
    tensors: tuple[Any, ...],
    given_strides: tuple[int, int],
    formula: Formula,
    scale_on_device: bool,
    mean: bool,
    total: bool,
    two_labels: bool,
    in_place: bool,
) -> tuple[Launcher, BatchLaunch]:
    """The kernel that suits the width: whole rows on chip, or rows in column blocks; and what it does for the means.

    Args:
        tensors: `layouts` of student and teachers.
        formula: with a name for its weighting.
        total: whether sums are wanted without a mean.
        in_place: whether the gradient may take the student's memory.
    """
    tensors = tuple(Layout(*x) for x in tensors)
    N, S, C = row_shape(tensors[0].shape)
    K = len(tensors) - 1
    ALIGN = alignment(tensors)
    stride_o, stride_i = stride_units(tensors, ALIGN)
    numbers = (
        *(stride_o[0], stride_i[0], unspecialised(stride_o[1:]), unspecialised(stride_i[1:])),
        *given_strides,
        *(N, S, C // ALIGN, formula.ignore_index),
        kernel_formula(formula, K),
    )
    flags: dict[str, Any] = {
        "K": K,
        **formula_constants(formula, K),
        "SCALE_ON_DEVICE": scale_on_device,
        "IN_PLACE": in_place,
        "TWO_LEVEL": len(tensors[0].shape) == 3,
        "ALIGN": ALIGN,
        "DEBUG": DEBUG,
    }
    itemsize, beyond = max(x.dtype.itemsize for x in tensors), not formula.is_basic()
    whole = on_chip(K, C, beyond)
    if whole:
        BLOCK_N, BLOCK_C, num_warps, maxnreg = onchip_launch(K, C, itemsize, ALIGN, two_labels or beyond)
        constants = {**flags, "BLOCK_N": BLOCK_N, "BLOCK_C": BLOCK_C}
        kernel, grid = row_loss_onchip_fwd_kernel, -(-N // BLOCK_N)
    else:
        BLOCK_C, VEC, GROUP, num_warps, maxnreg = streaming_launch(K, C, itemsize, ALIGN, two_labels, beyond)
        constants = {**flags, "BLOCK_C": BLOCK_C, "VEC": VEC, "GROUP": GROUP}
        kernel, grid = row_loss_streaming_fwd_kernel, N
    batch = batch_launch(N, grid, num_warps)
    if ALIGN == 1 and not whole:
        # Streamed element by element, the kernel has no registers left for the labels and the sums, and would spill.
        batch = batch._replace(INVERSE="before", ADDS_UP=False)
    if not mean:
        batch = batch._replace(INVERSE="", ADDS_UP=total and batch.ADDS_UP)
    constants.update(batch._asdict())
    return Launcher(kernel, grid, numbers, constants, num_warps=num_warps, maxnreg=maxnreg, debug=DEBUG), batch
