"""Who multiplies the gradient by loss_scale / divisor: the kernel when it stores the gradient, or backward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ScalePlan(NamedTuple):
    """How the factor loss_scale / divisor of the gradient is split between kernel and backward.

    Invariant (loss_scale is 1 in `camkd_loss`):

        in_kernel * in_backward == loss_scale / divisor

    If only the device knows the divisor (`inverse_divisor` is None), the kernel counts the rows and divides by their
    number itself; then in_kernel * in_backward == loss_scale.

    Scales are numbers where the host knows them, else one-element tensors in the accumulation dtype.
    """

    in_kernel: float | Tensor
    in_backward: float | Tensor
    inverse_divisor: float | Tensor | None  # None: the kernel returns it


def plan_scales(
    inverse_divisor: float | Tensor | None,
    loss_scale: float | Tensor | None,
    student_dtype: torch.dtype,
    accumulation_dtype: torch.dtype,
    device: torch.device,
    differentiable: bool = False,
) -> ScalePlan:
    """Splits the factor. Tensors of the plan are on `device`, the student's.

    Args:
        inverse_divisor: 1 / the divisor of "mean", 1 for the other reductions, None if the kernel counts the rows.
        loss_scale: None in `camkd_loss`, where backward can multiply. With a number or a one-element tensor
            (`camkd_loss_and_grad`) the kernel writes the finished gradient.
        differentiable: the rows are differentiable themselves (torch.compile), so nothing is left to scale.
    """
    if inverse_divisor is None:
        return ScalePlan(as_scale(1.0 if loss_scale is None else loss_scale, accumulation_dtype, device), 1.0, None)
    if loss_scale is not None:
        factor = as_scale(loss_scale, accumulation_dtype, device)
        return ScalePlan(as_scale(inverse_divisor * factor, accumulation_dtype, device), 1.0, inverse_divisor)
    if isinstance(inverse_divisor, float) and can_divide_in_kernel(student_dtype) and not differentiable:
        return ScalePlan(inverse_divisor, 1.0, inverse_divisor)
    return ScalePlan(1.0, inverse_divisor, inverse_divisor)


def can_divide_in_kernel(student_dtype: torch.dtype, loss_scale: float | Tensor | None = None) -> bool:
    """Scaling float16 gradients by 1/N in the kernel could underflow, so it is done only under a loss scale."""
    return student_dtype != torch.float16 or loss_scale is not None


def inverse_divisor(
    num_items: float | Tensor | None, valid: int | None, labels: Tensor, ignore_index: int, dtype: torch.dtype
) -> float | Tensor:
    """1 / the divisor of "mean".

    Args:
        num_items: the caller's divisor; None for the number of valid rows.
        valid: how many labels are not `ignore_index`, if the host has counted them.
        labels: (N,) int64, counted on their device if `valid` is None.
        dtype: of a tensor result.
    """
    if isinstance(num_items, Tensor):
        kept = (labels != ignore_index).any() if valid is None else valid > 0
        return divisor_of(num_items.to(labels.device, dtype), kept).reshape(1).reciprocal()
    if num_items is not None:
        return 1.0 / float(num_items)
    if valid is not None:
        return 1.0 / max(valid, 1)
    return (labels != ignore_index).sum().clamp(min=1).to(dtype).reciprocal().reshape(1)


def divisor_of(num_items: Tensor, kept: bool | Tensor) -> Tensor:
    """`num_items`; 1 unless rows are `kept`, since the sum of none, which is 0, may not be divided by 0."""
    num_items = num_items.detach()
    return num_items.where(kept, 1) if isinstance(kept, Tensor) else num_items if kept else torch.ones_like(num_items)


def as_scale(scale: float | Tensor, dtype: torch.dtype, device: torch.device) -> float | Tensor:
    """A scale as a kernel takes it: a number, or (1,) of this dtype on this device."""
    return scale.detach().reshape(1).to(device, dtype) if isinstance(scale, Tensor) else float(scale)


class Divisor(NamedTuple):
    """What the divisor of a reduction depends on."""

    reduction: str
    num_items: float | Tensor | None
    ignore_index: int

    def counts(self) -> bool:
        """Whether it is the number of valid samples."""
        return self.reduction == "mean" and self.num_items is None

    def inverse(self, target: Tensor, dtype: torch.dtype) -> float | Tensor:
        """1 / divisor; 1 for other reductions than "mean"."""
        if self.reduction != "mean":
            return 1.0
        return inverse_divisor(self.num_items, None, target, self.ignore_index, dtype)
