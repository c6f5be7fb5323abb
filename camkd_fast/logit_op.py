"""The rows of the logit loss as one call: directly into a backend, or as the registered op `camkd_fast::row_loss`.

Both have one signature and one result. `run_rows` is for eager mode, where crossing an op boundary costs more than the
kernel at C = 100; `traced_rows` is for torch.compile, where the op is opaque, has a fake and its own autograd formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .dispatch import backend_for
from .reference import RowLoss, accumulation_dtype
from .rows import contiguous_labels, first_order, row_view


class Formula(NamedTuple):
    """The numbers that define the loss of a row."""

    temperature: float
    hard_weight: float
    soft_weight: float
    ignore_index: int

    def check(self) -> None:
        checks.check_number("temperature", self.temperature, positive=True)
        checks.check_number("hard_weight", self.hard_weight, positive=False)
        checks.check_number("soft_weight", self.soft_weight, positive=False)
        checks.check_ignore_index(self.ignore_index)

    @property
    def divergence_scale(self) -> float:
        """d loss / d w_k over KL_k."""
        return self.soft_weight * self.temperature**2


def run_rows(
    student: Tensor,
    teachers: Sequence[Tensor],
    target: Tensor,
    weighting: str | Tensor,
    formula: Formula,
    needs_grad: bool,
    residual_scale: float | Tensor,
    backend: str,
    mean: bool = False,
) -> RowLoss:
    """The backend's numbers for tensors of any layout; labels are already checked. With `mean` also the means."""
    temperature, hard_weight, soft_weight, ignore_index = formula
    result = backend_for(backend, [student, *teachers]).row_loss(
        row_view(student),
        [row_view(teacher) for teacher in teachers],
        target,
        temperature=temperature,
        hard_weight=hard_weight,
        soft_weight=soft_weight,
        weighting=weighting,
        ignore_index=ignore_index,
        needs_grad=needs_grad,
        residual_scale=residual_scale,
        **({"mean": True} if mean else {}),  # the CPU's kernels are never asked: there the host knows the divisor
    )
    return RowLoss(*result)


@torch.library.custom_op("camkd_fast::row_loss", mutates_args=())
def _row_loss_op(
    student: Tensor,
    teachers: Sequence[Tensor],
    target: Tensor,
    weights: Tensor | None,
    residual_scale: Tensor | None,
    weighting: str,
    temperature: float,
    hard_weight: float,
    soft_weight: float,
    ignore_index: int,
    needs_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The numbers of a RowLoss, and the residual (N, C), or (0, C)."""
    labels = contiguous_labels(target)
    if not target.is_cuda:
        checks.count_labels(labels, student.shape[-1], ignore_index)
    result = run_rows(
        student,
        teachers,
        labels,
        weighting if weights is None else weights,
        Formula(temperature, hard_weight, soft_weight, ignore_index),
        needs_grad,
        1.0 if residual_scale is None else residual_scale,
        backend,
    )
    residual = student.new_empty((0, student.shape[-1])) if result.residual is None else result.residual
    return result.numbers, residual


@_row_loss_op.register_fake
def _(
    student: Tensor,
    teachers: Sequence[Tensor],
    target: Tensor,
    weights: Tensor | None,
    residual_scale: Tensor | None,
    weighting: str,
    temperature: float,
    hard_weight: float,
    soft_weight: float,
    ignore_index: int,
    needs_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    N, C = target.numel(), student.shape[-1]
    packed = student.new_empty((3 + 3 * len(teachers), N), dtype=accumulation_dtype(student.dtype))
    return packed, student.new_empty((N if needs_grad else 0, C))


def _op_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    student, teachers, _, weights, _, _, temperature, _, soft_weight, _, _, _ = inputs
    packed, residual = output
    K = len(teachers)
    ctx.save_for_backward(residual, packed[3 : 3 + K])
    ctx.shape, ctx.K, ctx.has_weights = student.shape, K, weights is not None
    ctx.divergence_scale = soft_weight * temperature**2
    ctx.mark_non_differentiable(residual)


@first_order
def _op_backward(ctx: Any, grad_packed: Tensor, _: Tensor) -> tuple[Any, ...]:
    residual, divergence = ctx.saved_tensors
    factor = grad_packed[0]
    grad_student = (residual.to(factor.dtype) * factor.unsqueeze(-1)).to(residual.dtype).view(ctx.shape)
    grad_weights = divergence * (factor * ctx.divergence_scale) if ctx.has_weights else None
    return (grad_student, [None] * ctx.K, None, grad_weights, *(None,) * 8)


_row_loss_op.register_autograd(_op_backward, setup_context=_op_setup_context)


def traced_rows(
    student: Tensor,
    teachers: Sequence[Tensor],
    target: Tensor,
    weighting: str | Tensor,
    formula: Formula,
    needs_grad: bool,
    residual_scale: float | Tensor,
    backend: str,
) -> RowLoss:
    """`run_rows` as one opaque, differentiable op, for torch.compile."""
    given = isinstance(weighting, Tensor)
    numbers, residual = _row_loss_op(
        student,
        list(teachers),
        target,
        weighting if isinstance(weighting, Tensor) else None,
        _scale_tensor(residual_scale, student),
        "uniform" if given else str(weighting),
        formula.temperature,
        formula.hard_weight,
        formula.soft_weight,
        formula.ignore_index,
        needs_grad,
        backend,
    )
    return RowLoss(numbers, residual)


def _scale_tensor(scale: float | Tensor, like: Tensor) -> Tensor | None:
    """The scale as the one-element tensor that the op takes; None stands for 1."""
    if isinstance(scale, Tensor):
        return scale
    return None if scale == 1.0 else torch.full((1,), scale, dtype=accumulation_dtype(like.dtype), device=like.device)
