"""`row_loss`: every row's numbers and, with them, the gradient, in one launch; two small ones more for a mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .batch_mean import batch_mean, batch_scale
from .launch import on_chip, onchip_launch, streaming_launch
from .layout import DEBUG, alignment, on_device_of, row_shape, stride_units, unspecialised
from .row_loss_onchip import row_loss_onchip_fwd_kernel
from .row_loss_streaming import row_loss_streaming_fwd_kernel

# Temperatures whose e^x the kernels get from e^{x/T} by one or two multiplications.
_T_POWERS = (1, 2, 4)


def row_loss(
    student: Tensor,
    teachers: Sequence[Tensor],
    target: Tensor,
    *,
    temperature: float,
    hard_weight: float,
    soft_weight: float,
    weighting: str | Tensor,
    ignore_index: int,
    needs_grad: bool,
    residual_scale: float | Tensor | None,
    mean: bool = False,
) -> tuple[Tensor, Tensor | None, None, tuple[Tensor, Tensor] | None]:
    """fp32 numbers (3 + 3K, N): loss, hard, soft, then KL_k, CE_k, w_k; with `needs_grad` the residual (N, C), and
    with `mean` the means.

    Args:
        student: (N, C) or (B, S, C), fp32 | bf16 | fp16, unit column stride, any row strides.
        teachers: K tensors of the student's shape; dtypes and strides may differ.
        target: (N,) int64, contiguous.
        weighting: "confidence" | "uniform" | "entropy" | fp32 weights (K, N), possibly expanded.
        residual_scale: multiplies the residual: a number, or a one-element fp32 tensor on the student's device.
        mean: divide the residual by the number of rows that count, and return means (`reference.row_loss`).
    """
    N, S, C = row_shape(student)
    K = len(teachers)
    stats = torch.empty((3 + 3 * K, N), dtype=torch.float32, device=student.device)
    residual = torch.empty((N, C), dtype=student.dtype, device=student.device) if needs_grad else None
    if not isinstance(residual_scale, Tensor):
        residual_scale = 1.0 if residual_scale is None else float(residual_scale)
    if mean:
        residual_scale, inverse = batch_scale(target, ignore_index, residual_scale).split(1)
    if N > 0:
        tensors = [student, *teachers]
        ALIGN = alignment(tensors)
        stride_o, stride_i = stride_units(tensors, ALIGN)
        given = weighting if isinstance(weighting, Tensor) else None
        kind = "given" if isinstance(weighting, Tensor) else weighting
        if K == 1 and kind in ("confidence", "entropy"):
            kind = "uniform"
        arguments = (
            *(student, tuple(teachers), target, given, stats, residual, residual_scale),
            *(stride_o[0], stride_i[0], unspecialised(stride_o[1:]), unspecialised(stride_i[1:])),
            *((0, 0) if given is None else given.stride()),
            *(N, S, C // ALIGN, ignore_index),
            *(float(temperature), math.log2(math.e) / temperature, float(hard_weight), float(soft_weight)),
        )
        flags: dict[str, Any] = {
            "K": K,
            "WEIGHTING": kind,
            "T_POWER": int(temperature) if temperature in _T_POWERS else 0,
            "SCALE_ON_DEVICE": isinstance(residual_scale, Tensor),
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
    return stats, residual, None, batch_mean(stats, inverse) if mean else None
