"""The rows of the logit loss by each of the three ways of `entry`.

`run_rows` calls a backend: an operator's dispatch costs more than the kernel at C = 100. `traced_rows` calls the
registered operator `camkd_fast::row_loss`, opaque to torch.compile, with a fake and its own autograd formula.
`expression_rows` consists of PyTorch operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.contract import LOSS, RowLossResult, SecondLabels, row_stats_count, second_pair
from ..backends.dispatch import backend_for
from ..backends.reference import accumulation_dtype, loss_terms, scaled, weight_gradient
from ..backends.reference import row_loss as reference_row_loss
from . import checks
from .autograd import first_order, savable
from .formula import Formula
from .layout import contiguous_labels, row_view, second_labels, second_rows


class RowLossCall(NamedTuple):
    """Checked arguments."""

    student: Tensor  # (..., C)
    teachers: Sequence[Tensor]  # K tensors (..., C)
    labels: Tensor  # (N,) int64, contiguous
    second: SecondLabels | None  # of rows (N,)
    formula: Formula  # a weighting tensor is (K, N)
    needs_grad: bool
    backend: str


def run_rows(
    call: RowLossCall, grad_scale: float | Tensor, mean: bool = False, total_scale: float | None = None
) -> RowLossResult:
    """The backend's numbers for tensors of any layout; with `mean` also the means."""
    given = (call.labels, call.formula.given_weights(), grad_scale, *(call.second or ()))
    others = [tensor for tensor in given if isinstance(tensor, Tensor)]
    return backend_for(call.backend, [call.student, *call.teachers], others).row_loss(
        row_view(call.student),
        [row_view(teacher) for teacher in call.teachers],
        call.labels,
        call.formula,
        needs_grad=call.needs_grad,
        grad_scale=grad_scale,
        mean=mean,
        total_scale=total_scale,
        second=call.second,
    )


@torch.library.custom_op("camkd_fast::row_loss", mutates_args=())
def _row_loss_op(
    student: Tensor,
    teachers: Sequence[Tensor],
    target: Tensor,
    second_target: Tensor | None,
    mix: Tensor | None,
    weights: Tensor | None,
    grad_scale: Tensor | None,
    constants: Sequence[float],
    weighting: str,
    divergence: str,
    ignore_index: int,
    needs_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """row_stats, and the gradient (N, C), or (0, C)."""
    labels = contiguous_labels(target)
    second = second_rows(second_labels(second_target, mix), accumulation_dtype(student.dtype))
    checks.count_if_dense(labels, student.shape[-1], ignore_index, second)
    formula = Formula.from_constants(constants, weighting, divergence, ignore_index, weights)
    call = RowLossCall(student, teachers, labels, second, formula, needs_grad, backend)
    result = run_rows(call, 1.0 if grad_scale is None else grad_scale)
    grad = student.new_empty((0, student.shape[-1])) if result.grad_student is None else result.grad_student
    return result.row_stats, grad


@_row_loss_op.register_fake
def _(
    student: Tensor,
    teachers: Sequence[Tensor],
    target: Tensor,
    second_target: Tensor | None,
    mix: Tensor | None,
    weights: Tensor | None,
    grad_scale: Tensor | None,
    constants: Sequence[float],
    weighting: str,
    divergence: str,
    ignore_index: int,
    needs_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    N, C = target.numel(), student.shape[-1]
    entropy = Formula.from_constants(constants, weighting, divergence, ignore_index, None).entropy
    count = row_stats_count(len(teachers), entropy)
    row_stats = student.new_empty((count, N), dtype=accumulation_dtype(student.dtype))
    return row_stats, student.new_empty((N if needs_grad else 0, C))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    student, teachers, _, _, _, weights, _, constants, weighting, divergence, ignore_index, _, _ = inputs
    row_stats, grad_student = output
    ctx.save_for_backward(grad_student, None if weights is None else row_stats)
    ctx.shape, ctx.K = student.shape, len(teachers)
    ctx.formula = Formula.from_constants(constants, weighting, divergence, ignore_index, None)
    ctx.mark_non_differentiable(grad_student)
    ctx.set_materialize_grads(False)  # else it gets (N, C) zeros


@first_order
def _backward(ctx: Any, grad_row_stats: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad_row_stats is None:
        return (None, [None] * ctx.K, *(None,) * 11)
    stored, row_stats = ctx.saved_tensors
    factor = grad_row_stats[LOSS]
    grad_student = grad_weights = None
    if ctx.needs_input_grad[0]:
        grad_student = scaled(stored, factor.unsqueeze(-1)).to(stored.dtype).view(ctx.shape)
    if row_stats is not None:
        grad_weights = weight_gradient(RowLossResult(row_stats, None), ctx.formula, factor)
    return (grad_student, [None] * ctx.K, None, None, None, grad_weights, *(None,) * 7)


_row_loss_op.register_autograd(_backward, setup_context=_setup_context)


def traced_rows(call: RowLossCall, grad_scale: float | Tensor) -> RowLossResult:
    """`run_rows` as one opaque, differentiable operator, for torch.compile."""
    row_stats, grad_student = _row_loss_op(
        call.student,
        list(call.teachers),
        call.labels,
        *second_pair(call.second),
        call.formula.given_weights(),
        _scale_tensor(grad_scale, call.student),
        *call.formula.constants(),
        call.needs_grad,
        call.backend,
    )
    return RowLossResult(row_stats, grad_student)


def _scale_tensor(scale: float | Tensor, like: Tensor) -> Tensor | None:
    """The scale as the operator takes it: a one-element tensor, or None for 1."""
    if isinstance(scale, Tensor):
        return scale
    return None if scale == 1.0 else torch.full((1,), scale, dtype=accumulation_dtype(like.dtype), device=like.device)


def expression_rows(call: RowLossCall, grad_scale: float | Tensor, with_grad: bool) -> RowLossResult:
    """`run_rows` in PyTorch operations: differentiable numbers, or with `with_grad` the gradient and no graph."""
    student, teachers = row_view(call.student), [savable(row_view(teacher)) for teacher in call.teachers]
    if with_grad:
        scale, second = grad_scale, call.second
        return reference_row_loss(
            student, teachers, call.labels, call.formula, needs_grad=True, grad_scale=scale, second=second
        )
    second = None if call.second is None else SecondLabels(*map(savable, call.second))
    return loss_terms(student, teachers, savable(call.labels), call.formula, second)
