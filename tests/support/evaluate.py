"""One evaluation through the public functions, and its results under one type."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from camkd_fast import camkd_loss, camkd_loss_and_grad
from tests.support.cases import Case


class Result(NamedTuple):
    """Results of one evaluation; `grad` is d (loss * grad_output).sum() / d student."""

    loss: Tensor
    hard: Tensor
    soft: Tensor
    weights: Tensor
    teacher_ce: Tensor
    divergence: Tensor
    grad: Tensor
    grad_weighting: Tensor | None = None


def fields(out: Any) -> list[Tensor]:
    """All tensors of an output, in the order of `Result`."""
    return [getattr(out, name) for name in ("loss", "hard", "soft", "weights", "teacher_ce", "divergence")]


def run(case: Case, backend: str, grad_output: Tensor | None = None) -> Result:
    """camkd_loss and one backward."""
    student = case.student.detach().requires_grad_()
    options = case.options()
    learned = None
    if isinstance(case.weighting, Tensor):
        learned = options["weighting"] = case.weighting.detach().requires_grad_()
    out = camkd_loss(student, case.teachers, case.target, backend=backend, **options)
    out.loss.backward(grad_output if case.reduction == "none" or grad_output is not None else None)
    assert student.grad is not None
    return Result(
        *(x.detach() for x in fields(out)), grad=student.grad, grad_weighting=None if learned is None else learned.grad
    )


def run_value_and_grad(case: Case, backend: str, loss_scale: float | Tensor = 1.0) -> Result:
    """camkd_loss_and_grad."""
    out, grad = camkd_loss_and_grad(
        case.student, case.teachers, case.target, backend=backend, loss_scale=loss_scale, **case.options()
    )
    return Result(*fields(out), grad=grad)
