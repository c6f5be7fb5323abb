"""The value of the logit loss and, with it, the student's gradient.

_in_one_call       ordinary tensors: one C++ call that also checks and reduces
_mean_on_device    the mean if only the device knows the number of valid rows: the kernel counts and reduces
_rows              everything else: rows by the way that suits the tensors (`entry`), reduced here
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.contract import SecondLabels
from ..backends.dispatch import whole_losses
from ..backends.reference import accumulation_dtype
from . import checks
from .entry import KERNEL, Way, computing, enter, way_of_call
from .formula import Formula, check_choice
from .layout import contiguous_labels, second_arguments, second_labels, second_rows, weight_rows
from .logit_op import RowLossCall, expression_rows, run_rows, traced_rows
from .output import CAMKDOutput, reduce_rows
from .scale_plan import ScalePlan, can_divide_in_kernel, inverse_divisor, plan_scales

# The kernel has applied all factors; only the gradient of given weights would read more of the plan.
_NOTHING_LEFT = ScalePlan(1.0, 1.0, None)


class Evaluated(NamedTuple):
    """The loss of a batch."""

    output: CAMKDOutput
    grad_student: Tensor | None  # (N, C), scaled as `plan` says
    formula: Formula  # of the rows: given weights are (K, N)
    plan: ScalePlan  # its inverse_divisor is known now
    in_graph: bool = False  # whether output.loss is part of an autograd graph already


def evaluate(
    student: Tensor,
    teacher_logits: Tensor | Sequence[Tensor],
    target: Tensor,
    second: SecondLabels | None,
    formula: Formula,
    reduction: str,
    num_items: float | Tensor | None,
    backend: str,
    loss_scale: float | Tensor | None,
) -> Evaluated:
    """Checks the arguments and computes the loss. With a `loss_scale`, the gradient is the finished one."""
    way = way_of_call()
    if way is KERNEL:
        evaluation = _in_one_call(
            student, teacher_logits, target, second, formula, reduction, num_items, backend, loss_scale
        )
        if evaluation is not None:
            return evaluation
    way, (student, teacher_logits, target, second_target, mix, weighting, num_items, loss_scale) = enter(
        way,
        backend,
        student_logits=student,
        teacher_logits=teacher_logits,
        target=target,
        **second_arguments(second),
        weighting=formula.weighting,
        num_items=num_items,
        loss_scale=loss_scale,
    )
    formula = formula.replaced(weighting=weighting)
    second = second_labels(second_target, mix)
    if loss_scale is not None:
        checks.check_scale("loss_scale", loss_scale)
    check_choice("reduction", reduction, checks.REDUCTIONS)
    checks.check_num_items(num_items, reduction)
    given = {"target": target, "second_target": second_target, "mix": mix, "weighting": weighting}
    with computing(way, student_logits=student, teacher_logits=teacher_logits, **given):
        call = _checked_call(student, teacher_logits, target, second, formula, backend, loss_scale is not None)
        return _evaluate_checked(call, target.shape, reduction, num_items, loss_scale, way)


def _evaluate_checked(
    call: RowLossCall,
    lead: torch.Size,
    reduction: str,
    num_items: float | Tensor | None,
    loss_scale: float | Tensor | None,
    way: Way,
) -> Evaluated:
    student, ignore_index = call.student, call.formula.ignore_index
    dtype = accumulation_dtype(student.dtype)
    valid = None
    if way is not Way.OPERATOR:
        valid = checks.count_if_dense(call.labels, student.shape[-1], ignore_index, call.second)
        # A trace would keep the number of this batch.
        valid = valid if way is Way.KERNEL else None
    inverse: float | Tensor = 1.0
    if reduction == "mean":
        unknown = num_items is None and valid is None and way is Way.KERNEL
        if unknown and can_divide_in_kernel(student.dtype, loss_scale):
            return _mean_on_device(call, lead, loss_scale, dtype)
        inverse = inverse_divisor(num_items, valid, call.labels, ignore_index, dtype)
    plan = plan_scales(inverse, loss_scale, student.dtype, dtype, student.device, way is not Way.KERNEL)
    return _rows(call, lead, reduction, plan, way, with_grad=loss_scale is not None)


def _checked_call(
    student: Tensor,
    teacher_logits: Tensor | Sequence[Tensor],
    target: Tensor,
    second: SecondLabels | None,
    formula: Formula,
    backend: str,
    with_grad: bool,
) -> RowLossCall:
    """The arguments of a backend. `with_grad`: the kernel writes the gradient, and nothing is part of a graph."""
    if with_grad:
        # Detached rather than under no_grad, where a teacher that requires grad would pass the checks.
        student = student.detach() if isinstance(student, Tensor) else student
        if isinstance(formula.weighting, Tensor):
            formula = formula.replaced(weighting=formula.weighting.detach())
    teachers = checks.check_logits(student, teacher_logits, target, second)
    formula = formula.checked(len(teachers))
    labels, dtype = contiguous_labels(target), accumulation_dtype(student.dtype)
    if isinstance(formula.weighting, Tensor):
        checks.check_weighting(formula.weighting, len(teachers), student.shape[:-1], "student_logits", student)
        rows = weight_rows(formula.weighting, len(teachers), labels.numel(), dtype)
        formula = formula.replaced(weighting=rows)
    needs_grad = with_grad or (torch.is_grad_enabled() and student.requires_grad)
    return RowLossCall(student, teachers, labels, second_rows(second, dtype), formula, needs_grad, backend)


def _in_one_call(
    student: Tensor,
    teachers: Tensor | Sequence[Tensor],
    target: Tensor,
    second: SecondLabels | None,
    formula: Formula,
    reduction: str,
    num_items: float | Tensor | None,
    backend: str,
    loss_scale: float | Tensor | None,
) -> Evaluated | None:
    """Fast path: one C++ call. Returns None for unsupported or invalid input; the general path reports the error."""
    whole = whole_losses(backend, student)
    if whole is None:
        return None
    found = whole.logit_loss(student, teachers, target, formula, reduction, num_items, loss_scale, second)
    if found is None:
        return None
    loss, row_stats, grad_student, sums, means, inverse = found
    output = CAMKDOutput(loss, row_stats, sums, means, inverse, target.shape)
    return Evaluated(output, grad_student, formula, _NOTHING_LEFT)


def _mean_on_device(
    call: RowLossCall, lead: torch.Size, loss_scale: float | Tensor | None, dtype: torch.dtype
) -> Evaluated:
    """The kernel counts the valid rows and reduces: fewer launches than in PyTorch, and no synchronisation."""
    plan = plan_scales(None, loss_scale, call.student.dtype, dtype, call.student.device)
    rows = run_rows(call, plan.in_kernel, mean=True)
    assert rows.means is not None  # they were requested
    loss, others = rows.means
    output = CAMKDOutput(loss, rows.row_stats, None, rows.means, None, lead)
    return Evaluated(output, rows.grad_student, call.formula, plan._replace(inverse_divisor=others[2:]))


def _rows(call: RowLossCall, lead: torch.Size, reduction: str, plan: ScalePlan, way: Way, with_grad: bool) -> Evaluated:
    inverse = None if reduction == "none" else plan.inverse_divisor
    if way is Way.KERNEL:
        rows = run_rows(call, plan.in_kernel, total_scale=inverse if isinstance(inverse, float) else None)
    elif way is Way.OPERATOR:
        rows = traced_rows(call, plan.in_kernel)
    else:
        rows = expression_rows(call, plan.in_kernel, with_grad)
    loss = reduce_rows(rows.row_stats, 0, rows.sums, rows.means, inverse, lead)
    output = CAMKDOutput(loss, rows.row_stats, rows.sums, rows.means, inverse, lead)
    return Evaluated(output, rows.grad_student, call.formula, plan, in_graph=way is not Way.KERNEL)
