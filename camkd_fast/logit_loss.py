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
from .dispatch import BACKENDS, backend_for, mean_loss_module
from .logit_op import Formula, run_rows, traced_rows
from .logit_output import CAMKDOutput, reduce_rows
from .reference import RowLoss, accumulation_dtype
from .rows import contiguous_labels, first_order, keeps_graph


class _Evaluation(NamedTuple):
    """The loss of a batch before it is part of a graph."""

    output: CAMKDOutput
    residual: Tensor | None
    weights: Tensor | None  # the caller's weights as (K, N), when given
    remaining: float | Tensor  # what the residual still lacks on the way to d loss / d student
    inverse: float | Tensor  # 1 / the divisor of the mean: a number, or a one-element tensor
    divergence_scale: float  # d loss / d w_k over KL_k, without the divisor


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


def _evaluate_plain(
    student: Tensor,
    teacher_logits: Tensor | Sequence[Tensor],
    target: Tensor,
    formula: Formula,
    weighting: str | Tensor,
    backend: str,
    loss_scale: float | Tensor | None,
) -> _Evaluation | None:
    """The mean over plain tensors on a CPU in one crossing to C++; None for anything else, also for what is wrong."""
    module = mean_loss_module(backend)
    if module is None:
        return None
    temperature, hard_weight, soft_weight, ignore_index = formula
    found = module.mean_loss(
        student,
        teacher_logits,
        target,
        temperature=temperature,
        hard_weight=hard_weight,
        soft_weight=soft_weight,
        weighting=weighting,
        ignore_index=ignore_index,
        loss_scale=loss_scale,
    )
    if found is None:
        return None
    loss, numbers, residual, sums, inverse = found
    output = CAMKDOutput(loss, RowLoss(numbers, None, sums), inverse, target.shape)
    return _Evaluation(output, residual, None, 1.0, inverse, formula.divergence_scale)


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
    tracing = torch.compiler.is_compiling()
    if reduction == "mean" and num_items is None and not tracing:
        plain = _evaluate_plain(student, teacher_logits, target, formula, weighting, backend, loss_scale)
        if plain is not None:
            return plain
    if loss_scale is not None:
        # Detached rather than under no_grad, where a teacher that requires grad would pass the checks.
        student = student.detach() if isinstance(student, Tensor) else student
        weighting = weighting.detach() if isinstance(weighting, Tensor) else weighting
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
    valid = None
    if labels.device.type == "cpu" and not tracing:
        valid = checks.count_labels(labels, student.shape[-1], formula.ignore_index)
    run = traced_rows if tracing else run_rows
    needs_residual = loss_scale is not None or (torch.is_grad_enabled() and student.requires_grad)
    # float16, whose exponent range 1/N would eat, takes it along only under a loss scale.
    takes_divisor = loss_scale is not None or student.dtype != torch.float16
    if reduction == "mean" and num_items is None and valid is None and not tracing and takes_divisor:
        # The divisor is on the device, and so is the reduction: a handful of launches less than in PyTorch.
        scale = _one_element(1.0 if loss_scale is None else loss_scale, dtype)
        rows = run_rows(student, teachers, labels, weighting, formula, needs_residual, scale, backend, mean=True)
        assert rows.means is not None  # they were asked for
        loss, others = rows.means
        output = CAMKDOutput(loss, rows, None, target.shape)
        return _Evaluation(output, rows.residual, weights, 1.0, others[2:], formula.divergence_scale)

    inverse: float | Tensor = 1.0
    if reduction == "mean":
        inverse = _inverse_count(labels, num_items, valid, formula.ignore_index, dtype)
    scale = 1.0
    if loss_scale is not None:
        scale = inverse * loss_scale
    elif isinstance(inverse, float) and takes_divisor and not tracing:
        # Known on the host, 1/N goes into the kernel's own store and leaves backward nothing to do.
        scale = inverse
    remaining = 1.0 if scale is inverse else inverse
    scale = _one_element(scale, dtype)
    rows = run(student, teachers, labels, weighting, formula, needs_residual, scale, backend)
    reduced = None if reduction == "none" else inverse
    output = CAMKDOutput(reduce_rows(rows, 0, reduced, target.shape), rows, reduced, target.shape)
    return _Evaluation(output, rows.residual, weights, remaining, inverse, formula.divergence_scale)


def _one_element(scale: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """As the backends take it."""
    return scale.reshape(1).to(dtype) if isinstance(scale, Tensor) else scale


class _ResidualGradient(torch.autograd.Function):
    """Gives a finished loss value the gradient that the kernel already wrote."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, weights: Tensor | None, evaluation: _Evaluation, backend: str) -> Tensor:
        ctx.save_for_backward(evaluation.residual, None if weights is None else evaluation.output._rows.divergence)
        ctx.shape, ctx.remaining, ctx.backend = student.shape, evaluation.remaining, backend
        if weights is not None:
            ctx.divergence_scale = evaluation.inverse * evaluation.divergence_scale
        return evaluation.output.loss

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        residual, divergence = ctx.saved_tensors
        wants_student, wants_weights = ctx.needs_input_grad[:2]
        grad_weights = None
        if wants_weights:
            grad_weights = divergence * (grad_output.reshape(-1) * ctx.divergence_scale)
        if not wants_student:
            return None, grad_weights, None, None
        retained = keeps_graph()
        if retained or not _is_one(grad_output, ctx.remaining):
            # Unless it is retained, the graph dies with this call and the residual with it: scale in place.
            out = torch.empty_like(residual) if retained else residual
            factor = grad_output.reshape(-1)
            if isinstance(ctx.remaining, Tensor) or ctx.remaining != 1.0:
                factor = factor * ctx.remaining
            residual = backend_for(ctx.backend, [residual]).scale_rows(residual, factor, out)
        return _shaped(residual, ctx.shape), grad_weights, None, None


def _shaped(residual: Tensor, shape: torch.Size) -> Tensor:
    """The residual (N, C) as the student's (..., C); a view costs more than this question."""
    return residual if residual.shape == shape else residual.view(shape)


def _is_one(grad_output: Tensor, remaining: float | Tensor) -> bool:
    """Is the factor 1, as in a plain `loss.backward()`? Not asked on a GPU, where the answer is a synchronisation."""
    on_host = grad_output.device.type == "cpu" and isinstance(remaining, float)
    return on_host and grad_output.dim() == 0 and bool(grad_output.item() * remaining == 1.0)


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
    output, weights = result.output, result.weights
    wants_grad = student_logits.requires_grad or (weights is not None and weights.requires_grad)
    if wants_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        output.loss = _ResidualGradient.apply(student_logits, weights, result, backend)  # type: ignore[no-untyped-call]
    return output


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
    result = _evaluate(
        student_logits, teacher_logits, target, formula, weighting, reduction, num_items, backend, loss_scale
    )
    assert result.residual is not None  # a loss_scale asks for it
    return result.output, _shaped(result.residual, student_logits.shape)


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
