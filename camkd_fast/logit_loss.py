"""The logit loss: camkd_loss, camkd_loss_and_grad and CAMKDLoss.

One path: checks -> rows from a backend (`logit_op`) -> one reduction -> autograd. The kernel writes the gradient along
with the loss, so in eager mode the autograd node (`_ResidualGradient`) only has to hand it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import checks
from .dispatch import BACKENDS, backend_for
from .logit_op import Formula, run_rows, traced_rows
from .reference import RowLoss, accumulation_dtype
from .rows import contiguous_labels, first_order, keeps_graph


class CAMKDOutput(NamedTuple):
    """What the logit loss returns, in the accumulation dtype. Only `loss` is differentiable."""

    loss: Tensor  # hard_weight * hard + soft_weight * soft: a scalar, or (...) for reduction="none"
    hard: Tensor  # cross-entropy of the student, reduced like `loss`
    soft: Tensor  # T^2 sum_k w_k KL_k, reduced like `loss`
    weights: Tensor  # (K, ...): w_k, 0 on ignored rows
    teacher_ce: Tensor  # (K, ...): CE_k at temperature 1, 0 on ignored rows
    divergence: Tensor  # (K, ...): KL_k at temperature T, 0 on ignored rows


class _Evaluation(NamedTuple):
    """The loss of a batch before it is part of a graph."""

    loss: Tensor
    hard: Tensor
    soft: Tensor
    rows: RowLoss
    weights: Tensor | None  # the caller's weights as (K, N), when given
    remaining: float | Tensor  # what the residual still lacks on the way to d loss / d student
    inverse: float | Tensor  # 1 / divisor of the reduction

    def output(self, loss: Tensor, lead: torch.Size) -> CAMKDOutput:
        per_teacher = [self.rows.weights, self.rows.teacher_ce, self.rows.divergence]
        if len(lead) != 1:
            per_teacher = [numbers.view(-1, *lead) for numbers in per_teacher]
        return CAMKDOutput(loss, self.hard.detach(), self.soft.detach(), *per_teacher)


def _inverse_count(
    labels: Tensor, num_items: float | Tensor | None, valid: int | None, ignore_index: int, dtype: torch.dtype
) -> float | Tensor:
    """1 / the divisor of reduction="mean": a float where the host knows it, else a one-element tensor of `dtype`."""
    if isinstance(num_items, Tensor):
        return num_items.to(labels.device, dtype).reshape(1).reciprocal()
    if num_items is not None:
        return 1.0 / num_items
    if valid is not None:
        return 1.0 / max(valid, 1)
    return (labels != ignore_index).sum().clamp(min=1).to(dtype).reciprocal().reshape(1)


def _as_rows(weighting: Tensor, K: int, N: int, dtype: torch.dtype) -> Tensor:
    """(K,) or (K, ...) weights as (K, N); the expansion is part of the graph, so it sums their gradient."""
    flat = weighting.reshape(K, -1) if weighting.dim() > 1 else weighting.unsqueeze(-1)
    return flat.expand(K, N).to(dtype)


def _evaluate(
    student: Tensor,
    teacher_logits: Tensor | Sequence[Tensor],
    target: Tensor,
    formula: Formula,
    weighting: str | Tensor,
    reduction: str,
    num_items: float | Tensor | None,
    backend: str,
    loss_scale: float | Tensor | None,
) -> _Evaluation:
    """Checks, rows, reduction. With a `loss_scale` the residual comes out as the finished gradient."""
    teachers = checks.check_logits(student, teacher_logits, target)
    formula.check()
    checks.check_weighting(weighting, len(teachers), student)
    checks.check_choice("reduction", reduction, checks.REDUCTIONS)
    checks.check_num_items(num_items, reduction)

    labels = contiguous_labels(target)
    dtype = accumulation_dtype(student.dtype)
    weights = None
    if isinstance(weighting, Tensor):
        weighting = weights = _as_rows(weighting, len(teachers), labels.numel(), dtype)
    tracing = torch.compiler.is_compiling()
    valid = None
    if labels.device.type == "cpu" and not tracing:
        valid = checks.count_labels(labels, student.shape[-1], formula.ignore_index)
    inverse: float | Tensor = 1.0
    if reduction == "mean":
        inverse = _inverse_count(labels, num_items, valid, formula.ignore_index, dtype)

    scale: float | Tensor = 1.0
    if loss_scale is not None:
        scale = inverse * loss_scale
    elif isinstance(inverse, float) and student.dtype != torch.float16 and not tracing:
        # Known on the host, 1/N goes into the kernel's own store and leaves backward nothing to do.
        # Not in float16, whose exponent range 1/N would eat.
        scale = inverse
    remaining = 1.0 if scale is inverse else inverse
    if isinstance(scale, Tensor):
        scale = scale.reshape(1).to(dtype)
    needs_residual = loss_scale is not None or (torch.is_grad_enabled() and student.requires_grad)
    run = traced_rows if tracing else run_rows
    rows = run(student, teachers, labels, weighting, formula, needs_residual, scale, backend)
    if reduction == "none":
        loss, hard, soft = rows.rows.view(3, *target.shape).unbind()
    else:
        sums = rows.rows.sum(1)
        loss, hard, soft = (sums if reduction == "sum" else sums * inverse).unbind()
    return _Evaluation(loss, hard, soft, rows, weights, remaining, inverse)


class _ResidualGradient(torch.autograd.Function):
    """Gives a finished loss value the gradient that the kernel already wrote."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, weights: Tensor | None, evaluation: _Evaluation, formula: Formula, backend: str
    ) -> Tensor:
        ctx.save_for_backward(evaluation.rows.residual, None if weights is None else evaluation.rows.divergence)
        ctx.shape, ctx.remaining, ctx.backend = student.shape, evaluation.remaining, backend
        ctx.divergence_scale = evaluation.inverse * formula.divergence_scale
        return evaluation.loss

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        residual, divergence = ctx.saved_tensors
        grad = grad_output.reshape(-1)
        grad_weights = divergence * (grad * ctx.divergence_scale) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_weights, None, None, None
        factor = grad * ctx.remaining
        retained = keeps_graph()
        # Reading the factor costs nothing on a CPU; on a GPU it would be a synchronisation.
        if retained or residual.is_cuda or factor.numel() != 1 or factor.item() != 1.0:
            # Unless it is retained, the graph dies with this call and the residual with it: scale in place.
            out = torch.empty_like(residual) if retained else residual
            residual = backend_for(ctx.backend, [residual]).scale_rows(residual, factor, out)
        return residual.view(ctx.shape), grad_weights, None, None, None


def camkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | Sequence[Tensor],
    target: Tensor,
    *,
    temperature: float = 4.0,
    hard_weight: float = 1.0,
    soft_weight: float = 1.0,
    weighting: str | Tensor = "confidence",
    reduction: str = "mean",
    ignore_index: int = -100,
    num_items: float | Tensor | None = None,
    backend: str = "auto",
) -> CAMKDOutput:
    """Confidence-aware multi-teacher distillation loss (CA-MKD, arXiv 2201.00007, eq. 2 to 4).

    loss = hard_weight * CE(student, target) + soft_weight * T^2 * sum_k w_k KL(softmax(z_k/T) || softmax(s/T))

    Args:
        student_logits: (..., C); float32, bfloat16, float16, or float64 (which runs on the reference).
        teacher_logits: K tensors (..., C), whose dtypes may differ, or one (K, ..., C) tensor; K from 1 to 16.
        target: (...) int64 labels in [0, C), or `ignore_index`.
        temperature: T > 0. Cross-entropies are always at temperature 1.
        weighting: "confidence" (the paper), "uniform" (AVER), "entropy" (EBKD), or weights (K,) or (K, ...), which
            are differentiable.
        reduction: "mean" over the rows that are not ignored, "sum", or "none".
        num_items: divisor of "mean" instead of the number of rows (gradient accumulation, data parallel).
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        CAMKDOutput; its `loss` is differentiable once with respect to the student (and given weights).

    Raises:
        ValueError, TypeError: an argument is unfit; both offending values are named. Labels out of range are
            refused for CPU tensors and give NaN rows on a GPU, where looking at them would stall the stream.
        NotImplementedError: `backend` was named and cannot run these tensors.
    """
    formula = Formula(temperature, hard_weight, soft_weight, ignore_index)
    result = _evaluate(student_logits, teacher_logits, target, formula, weighting, reduction, num_items, backend, None)
    loss, weights = result.loss, result.weights
    wants_grad = student_logits.requires_grad or (weights is not None and weights.requires_grad)
    if wants_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        loss = _ResidualGradient.apply(student_logits, weights, result, formula, backend)
    return result.output(loss, target.shape)


def camkd_loss_and_grad(
    student_logits: Tensor,
    teacher_logits: Tensor | Sequence[Tensor],
    target: Tensor,
    *,
    temperature: float = 4.0,
    hard_weight: float = 1.0,
    soft_weight: float = 1.0,
    weighting: str | Tensor = "confidence",
    reduction: str = "mean",
    ignore_index: int = -100,
    num_items: float | Tensor | None = None,
    loss_scale: float | Tensor = 1.0,
    backend: str = "auto",
) -> tuple[CAMKDOutput, Tensor]:
    """`camkd_loss` and d(loss_scale * loss) / d student_logits in one pass, for `student_logits.backward(grad)`.

    Reads K+1 inputs and writes one gradient, (K+2) N C elements in all, and records no graph. Arguments, errors and
    the first result are those of `camkd_loss`; for reduction="none" the gradient is that of each row's own loss.

    Args:
        loss_scale: multiplies the gradient only (a GradScaler's scale: a number or a one-element tensor).

    Returns:
        (output, grad): grad has the student's shape and dtype, contiguous.
    """
    formula = Formula(temperature, hard_weight, soft_weight, ignore_index)
    checks.check_scale("loss_scale", loss_scale)
    with torch.no_grad():
        result = _evaluate(
            student_logits, teacher_logits, target, formula, weighting, reduction, num_items, backend, loss_scale
        )
        assert result.rows.residual is not None  # a loss_scale asks for it
        grad = result.rows.residual.view(student_logits.shape)
        return result.output(result.loss.detach(), target.shape), grad


class CAMKDLoss(nn.Module):
    """`camkd_loss` as a module: same keywords at construction, tensors at the call.

    >>> criterion = CAMKDLoss(temperature=4.0)
    >>> criterion(student_logits, teacher_logits, target).loss.backward()
    """

    def __init__(
        self,
        temperature: float = 4.0,
        hard_weight: float = 1.0,
        soft_weight: float = 1.0,
        weighting: str | Tensor = "confidence",
        reduction: str = "mean",
        ignore_index: int = -100,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        Formula(temperature, hard_weight, soft_weight, ignore_index).check()
        if not isinstance(weighting, Tensor):
            checks.check_choice("weighting", weighting, checks.WEIGHTINGS)
        checks.check_choice("reduction", reduction, checks.REDUCTIONS)
        checks.check_choice("backend", backend, ("auto", *BACKENDS))
        self.temperature, self.hard_weight, self.soft_weight = temperature, hard_weight, soft_weight
        self.weighting = weighting  # an nn.Parameter here is registered, hence learned
        self.reduction, self.ignore_index, self.backend = reduction, ignore_index, backend

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | Sequence[Tensor],
        target: Tensor,
        num_items: float | Tensor | None = None,
    ) -> CAMKDOutput:
        return camkd_loss(
            student_logits,
            teacher_logits,
            target,
            temperature=self.temperature,
            hard_weight=self.hard_weight,
            soft_weight=self.soft_weight,
            weighting=self.weighting,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            num_items=num_items,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        weighting = "tensor" if isinstance(self.weighting, Tensor) else self.weighting
        return (
            f"temperature={self.temperature}, hard_weight={self.hard_weight}, soft_weight={self.soft_weight}, "
            f"weighting={weighting}, reduction={self.reduction}, backend={self.backend}"
        )
