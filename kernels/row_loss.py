"""`row_loss`: every row's numbers and the gradient in one launch; for a mean, two small launches more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backends.contract import RowLossResult, row_stats_count
from .batch_mean import batch_mean, batch_scale
from .launch import on_chip, onchip_launch, streaming_launch
from .layout import DEBUG, alignment, on_device_of, row_shape, stride_units, unspecialised
from .results import kernel_formula, temperature_power, weighting_kind
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
) -> RowLossResult:
    """See `contract.Backend`. fp32, bf16 and fp16 logits; dtypes and strides may differ between tensors."""
    N, C = row_shape(student)[0], student.shape[-1]
    row_stats = torch.empty((row_stats_count(len(teachers)), N), dtype=torch.float32, device=student.device)
    grad_student = torch.empty((N, C), dtype=student.dtype, device=student.device) if needs_grad else None
    scale = grad_scale if isinstance(grad_scale, Tensor) else float(grad_scale)
    if mean:
        scale, inverse = batch_scale(target, formula.ignore_index, scale).split(1)
    if N > 0:
        _launch(student, teachers, target, formula, row_stats, grad_student, scale)
    return RowLossResult(row_stats, grad_student, None, batch_mean(row_stats, inverse) if mean else None)


def _launch(
    student: Tensor,
    teachers: Sequence[Tensor],
    target: Tensor,
    formula: Formula,
    row_stats: Tensor,
    grad_student: Tensor | None,
    grad_scale: float | Tensor,
) -> None:
    """The kernel that suits the width: whole rows on chip, or rows in column blocks."""
    N, S, C = row_shape(student)
    K = len(teachers)
    tensors = [student, *teachers]
    ALIGN = alignment(tensors)
    stride_o, stride_i = stride_units(tensors, ALIGN)
    given = formula.weighting if isinstance(formula.weighting, Tensor) else None
    arguments = (
        *(student, tuple(teachers), target, given, row_stats, grad_student, grad_scale),
        *(stride_o[0], stride_i[0], unspecialised(stride_o[1:]), unspecialised(stride_i[1:])),
        *((0, 0) if given is None else given.stride()),
        *(N, S, C // ALIGN, formula.ignore_index),
        kernel_formula(formula),
    )
    flags: dict[str, Any] = {
        "K": K,
        "WEIGHTING": weighting_kind(formula, K),
        "T_POWER": temperature_power(formula),
        "SCALE_ON_DEVICE": isinstance(grad_scale, Tensor),
        "TWO_LEVEL": student.dim() == 3,
        "ALIGN": ALIGN,
        "DEBUG": DEBUG,
        "debug": DEBUG,
    }
    itemsize = max(tensor.element_size() for tensor in tensors)
    with on_device_of(student):
        if on_chip(K, C):
            launch = onchip_launch(K, C, itemsize, ALIGN)
            row_loss_onchip_fwd_kernel[(-(-N // launch.BLOCK_N),)](*arguments, **flags, **launch._asdict())
        else:
            step = streaming_launch(K, C, itemsize, ALIGN)
            row_loss_streaming_fwd_kernel[(N,)](*arguments, **flags, **step._asdict())
