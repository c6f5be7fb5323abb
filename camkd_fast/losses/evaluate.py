"""The value of the logit loss and, with it, the student's gradient: one of three routes to a backend.

_mean_on_cpu       the mean over ordinary CPU tensors: one C++ call that also checks and reduces
_mean_on_device    the mean if only the device knows the number of valid rows: the kernel counts and reduces
_rows              everything else: rows from a backend, reduced here
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.dispatch import mean_loss_backend
from ..backends.reference import accumulation_dtype
from . import checks
from .formula import Formula, check_choice
from .layout import contiguous_labels
from .logit_op import RowLossCall, run_rows, traced_rows
from .output import CAMKDOutput, reduce_rows
from .scale_plan import ScalePlan, can_divide_in_kernel, inverse_divisor, plan_scales


class Evaluation(NamedTuple):
    """The loss of a batch before it is part of an autograd graph."""

    output: CAMKDOutput
    grad_student: Tensor | None  # (N, C), scaled as `plan` says
    weights: Tensor | None  # the caller's weights as (K, N), if given
    plan: ScalePlan  # its inverse_divisor is known now


def evaluate(
    student: Tensor,
    teacher_logits: Tensor | Sequence[Tensor],
    target: Tensor,
    formula: Formula,
    reduction: str,
    num_items: float | Tensor | None,
    backend: str,
    loss_scale: float | Tensor | None,
) -> Evaluation:
    """Checks the arguments and computes the loss. With a `loss_scale`, the gradient is the finished one."""
    tracing = torch.compiler.is_compiling()
    if reduction == "mean" and num_items is None and not tracing:
        evaluation = _mean_on_cpu(student, teacher_logits, target, formula, backend, loss_scale)
        if evaluation is not None:
            return evaluation
    call = _checked_call(student, teacher_logits, target, formula, backend, with_grad=loss_scale is not None)
    check_choice("reduction", reduction, checks.REDUCTIONS)
    checks.check_num_items(num_items, reduction)

    dtype, ignore_index = accumulation_dtype(student.dtype), call.formula.ignore_index
    valid = None
    if call.labels.device.type == "cpu" and not tracing:
        valid = checks.count_labels(call.labels, student.shape[-1], ignore_index)
    inverse: float | Tensor = 1.0
    if reduction == "mean":
        unknown = num_items is None and valid is None and not tracing
        if unknown and can_divide_in_kernel(student.dtype, loss_scale):
            return _mean_on_device(call, target.shape, loss_scale, dtype)
        inverse = inverse_divisor(num_items, valid, call.labels, ignore_index, dtype)
    plan = plan_scales(inverse, loss_scale, student.dtype, dtype, tracing)
    return _rows(call, target.shape, reduction, plan, tracing)


def _checked_call(
    student: Tensor,
    teacher_logits: Tensor | Sequence[Tensor],
    target: Tensor,
    formula: Formula,
    backend: str,
    with_grad: bool,
) -> RowLossCall:
    """The arguments of a backend. `with_grad`: the kernel writes the gradient, and nothing is part of a graph."""
    if with_grad:
        # Detached rather than under no_grad, where a teacher that requires grad would pass the checks.
        student = student.detach() if isinstance(student, Tensor) else student
        if isinstance(formula.weighting, Tensor):
            formula = formula._replace(weighting=formula.weighting.detach())
    teachers = checks.check_logits(student, teacher_logits, target)
    formula = formula.checked()
    labels = contiguous_labels(target)
    if isinstance(formula.weighting, Tensor):
        checks.check_weighting(formula.weighting, len(teachers), student)
        rows = _weights_as_rows(formula.weighting, len(teachers), labels.numel(), accumulation_dtype(student.dtype))
        formula = formula._replace(weighting=rows)
    needs_grad = with_grad or (torch.is_grad_enabled() and student.requires_grad)
    return RowLossCall(student, teachers, labels, formula, needs_grad, backend)


def _mean_on_cpu(
    student: Tensor,
    teachers: Tensor | Sequence[Tensor],
    target: Tensor,
    formula: Formula,
    backend: str,
    loss_scale: float | Tensor | None,
) -> Evaluation | None:
    """Fast path: one C++ call. Returns None for unsupported or invalid input; the general path reports the error."""
    module = mean_loss_backend(backend)
    if module is None:
        return None
    found = module.mean_loss(student, teachers, target, formula, loss_scale)
    if found is None:
        return None
    loss, row_stats, grad_student, sums, inverse = found
    output = CAMKDOutput(loss, row_stats, sums, None, inverse, target.shape)
    return Evaluation(output, grad_student, None, ScalePlan(inverse, 1.0, inverse))


def _mean_on_device(
    call: RowLossCall, lead: torch.Size, loss_scale: float | Tensor | None, dtype: torch.dtype
) -> Evaluation:
    """The kernel counts the valid rows and reduces: fewer launches than in PyTorch, and no synchronisation."""
    plan = plan_scales(None, loss_scale, call.student.dtype, dtype)
    rows = run_rows(call, plan.in_kernel, mean=True)
    assert rows.means is not None  # they were requested
    loss, others = rows.means
    output = CAMKDOutput(loss, rows.row_stats, None, rows.means, None, lead)
    return Evaluation(output, rows.grad_student, call.given_weights, plan._replace(inverse_divisor=others[2:]))


def _rows(call: RowLossCall, lead: torch.Size, reduction: str, plan: ScalePlan, tracing: bool) -> Evaluation:
    rows = (traced_rows if tracing else run_rows)(call, plan.in_kernel)
    inverse = None if reduction == "none" else plan.inverse_divisor
    loss = reduce_rows(rows.row_stats, 0, rows.sums, None, inverse, lead)
    output = CAMKDOutput(loss, rows.row_stats, rows.sums, None, inverse, lead)
    return Evaluation(output, rows.grad_student, call.given_weights, plan)


def _weights_as_rows(weighting: Tensor, K: int, N: int, dtype: torch.dtype) -> Tensor:
    """(K,) or (K, ...) weights as (K, N); the expansion is part of the graph, so it sums their gradient."""
    flat = weighting.reshape(K, -1) if weighting.dim() > 1 else weighting.unsqueeze(-1)
    return flat.expand(K, N).to(dtype)
