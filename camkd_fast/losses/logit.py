"""The logit loss: camkd_loss, camkd_loss_and_grad and CAMKDLoss (arXiv 2201.00007, eq. 2 to 4).

The kernel writes the gradient together with the loss, so in eager mode the autograd node only returns it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.contract import RowLossResult, SecondLabels
from ..backends.dispatch import BACKENDS, backend_for
from ..backends.memory import is_ordinary
from ..backends.reference import scaled, weight_gradient
from . import checks
from .autograd import first_order, is_one, keeps_graph
from .evaluate import Evaluated, evaluate
from .formula import Formula, check_choice
from .layout import second_labels
from .output import CAMKDOutput

# The constructor of a NamedTuple is a Python function, which takes 0.1 us more.
_formula_of: Callable[[tuple[Any, ...]], Formula] = partial(tuple.__new__, Formula)


class _LogitLoss(torch.autograd.Function):
    """Attaches the gradient that the kernel has written to a finished loss value."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, weights: Tensor | None, evaluation: Evaluated, backend: str) -> Tensor:
        output, grad_student, formula, plan, _ = evaluation
        ctx.save_for_backward(grad_student, None if weights is None else output._row_stats)
        ctx.shape, ctx.in_backward, ctx.backend = student.shape, plan.in_backward, backend
        if weights is not None:
            # Without the tensor, which the caller may change.
            ctx.formula, ctx.inverse_divisor = formula.replaced(weighting="uniform"), plan.inverse_divisor
        return output.loss

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad, row_stats = ctx.saved_tensors
        needs_student, needs_weights = ctx.needs_input_grad[:2]
        grad_weights = None
        if needs_weights:
            factor = grad_output.reshape(-1) * ctx.inverse_divisor
            grad_weights = weight_gradient(RowLossResult(row_stats, None), ctx.formula, factor)
        if not needs_student:
            return None, grad_weights, None, None
        retained = keeps_graph()
        if retained or not is_one(grad_output, ctx.in_backward):
            # Unless it is retained, the graph is freed after this call and the saved gradient with it: scale in place.
            out = torch.empty_like(grad) if retained else grad
            factor = grad_output.reshape(-1)
            if isinstance(ctx.in_backward, Tensor) or ctx.in_backward != 1.0:
                factor = factor * ctx.in_backward
            if is_ordinary([factor]):
                grad = backend_for(ctx.backend, [grad]).scale_rows(grad, factor, out)
            else:  # a batch of gradients, or inside a trace
                grad = scaled(grad, factor.unsqueeze(-1)).to(grad.dtype)
        return _shaped(grad, ctx.shape), grad_weights, None, None


def _shaped(grad: Tensor, shape: torch.Size) -> Tensor:
    """The gradient (N, C) as the student's (..., C)."""
    return grad if len(shape) == 2 else grad.view(shape)


def _differentiable_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | Sequence[Tensor],
    target: Tensor,
    second: SecondLabels | None,
    formula: Formula,
    reduction: str,
    num_items: float | Tensor | None,
    backend: str,
) -> CAMKDOutput:
    evaluation = evaluate(student_logits, teacher_logits, target, second, formula, reduction, num_items, backend, None)
    output, weights = evaluation.output, evaluation.formula.given_weights()
    needs_grad = student_logits.requires_grad or (weights is not None and weights.requires_grad)
    if needs_grad and torch.is_grad_enabled() and not evaluation.in_graph:
        output.loss = _LogitLoss.apply(student_logits, weights, evaluation, backend)  # type: ignore[no-untyped-call]
    return output


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
    second_target: Tensor | None = None,
    mix: Tensor | None = None,
    divergence: str | tuple[str, float] = "forward_kl",
    scale_by_t2: bool = True,
    z_loss_weight: float = 0.0,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_logit_scales: Sequence[float] | None = None,
    teacher_softcaps: Sequence[float | None] | None = None,
    entropy: bool = False,
) -> CAMKDOutput:
    """Confidence-aware multi-teacher distillation loss (CA-MKD, arXiv 2201.00007, eq. 2 to 4).

    loss = hard_weight * CE(student, target) + soft_weight * T^2 * sum_k w_k KL(softmax(z_k/T) || softmax(s/T))

    Args:
        student_logits: (..., C); float32, bfloat16, float16, or float64 (which runs on the reference).
        teacher_logits: K tensors (..., C), whose dtypes may differ, or one (K, ..., C) tensor; K from 1 to 16.
        target: (...) int64 labels in [0, C), or `ignore_index`.
        temperature: T > 0. Cross-entropies are always at temperature 1.
        hard_weight, soft_weight: coefficients of the two terms (paper: 1 and alpha; the official code: alpha / K).
        weighting: "confidence" (the paper), "uniform" (AVER), "entropy" (EBKD), "min_ce" (only the teacher with the
            lowest cross-entropy, the first of several), or weights (K,) or (K, ...), which are differentiable.
        reduction: "mean" over the rows that are not ignored, "sum", or "none".
        num_items: divisor of "mean" instead of the number of rows (gradient accumulation, data parallel).
        backend: "auto", "cuda", "triton", "cpu" or "reference".
        second_target, mix: a second label for every row (Mixup, CutMix), (...) int64 like `target`, and the share of
            `target`, (...) floating in [0, 1]; both or neither. Every cross-entropy, that of the student and those in
            the weights, becomes mix * CE(target) + (1 - mix) * CE(second_target). Not read where `target` is
            `ignore_index`; elsewhere a second label must not be `ignore_index`. No gradient.
        divergence: "forward_kl" (the paper), "reverse_kl", ("jsd", beta) or ("skew", alpha), in the place of KL_k; see
            `losses.divergence.Divergence`.
        scale_by_t2: whether the soft term is multiplied by T^2.
        z_loss_weight: adds z_loss_weight * logsumexp(student)^2, at temperature 1, to `loss`.
        student_logit_scale, student_softcap, teacher_logit_scales, teacher_softcaps: the logits are
            cap * tanh(scale * x / cap) of the given tensors x, or scale * x where the cap is None; for teachers one
            number each. The gradient is that of x.
        entropy: whether the output has the student's `entropy`.

    Returns:
        CAMKDOutput; its `loss` is differentiable once with respect to the student (and given weights).

    Raises:
        ValueError, TypeError: an argument is invalid; both offending values are named. Labels and shares out of range
            raise for CPU tensors and give NaN rows on a GPU, where reading them would synchronise.
        NotImplementedError: `backend` names a backend that cannot run these tensors.
    """
    formula = _formula_of(
        (
            temperature,
            hard_weight,
            soft_weight,
            weighting,
            ignore_index,
            divergence,
            scale_by_t2,
            z_loss_weight,
            student_logit_scale,
            student_softcap,
            teacher_logit_scales,
            teacher_softcaps,
            entropy,
        )
    )
    second = second_labels(second_target, mix)
    return _differentiable_loss(student_logits, teacher_logits, target, second, formula, reduction, num_items, backend)


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
    second_target: Tensor | None = None,
    mix: Tensor | None = None,
    divergence: str | tuple[str, float] = "forward_kl",
    scale_by_t2: bool = True,
    z_loss_weight: float = 0.0,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_logit_scales: Sequence[float] | None = None,
    teacher_softcaps: Sequence[float | None] | None = None,
    entropy: bool = False,
) -> tuple[CAMKDOutput, Tensor]:
    """`camkd_loss` and d(loss_scale * loss) / d student_logits in one pass, for `student_logits.backward(grad)`.

    Reads K+1 inputs and writes one gradient, (K+2) N C elements in all, and records no graph. Arguments, errors and
    the first result are those of `camkd_loss`; for reduction="none" the gradient is that of each row's own loss.

    Args:
        loss_scale: multiplies the gradient only (a GradScaler's scale: a number or a one-element tensor).

    Returns:
        (output, grad): grad has the student's shape and dtype, contiguous.
    """
    formula = _formula_of(
        (
            temperature,
            hard_weight,
            soft_weight,
            weighting,
            ignore_index,
            divergence,
            scale_by_t2,
            z_loss_weight,
            student_logit_scale,
            student_softcap,
            teacher_logit_scales,
            teacher_softcaps,
            entropy,
        )
    )
    if type(loss_scale) is not float:  # `evaluate` checks floats, outside its fast path
        checks.check_scale("loss_scale", loss_scale)
    second = second_labels(second_target, mix)
    evaluation = evaluate(
        student_logits, teacher_logits, target, second, formula, reduction, num_items, backend, loss_scale
    )
    assert evaluation.grad_student is not None  # a loss_scale requests it
    return evaluation.output, _shaped(evaluation.grad_student, student_logits.shape)


class CAMKDLoss(nn.Module):
    """`camkd_loss` as a module: the same keywords at construction, tensors in the call.

    A `weighting` tensor is a buffer, as the weight of nn.CrossEntropyLoss: it is moved and saved with the module.

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
        *,
        divergence: str | tuple[str, float] = "forward_kl",
        scale_by_t2: bool = True,
        z_loss_weight: float = 0.0,
        student_logit_scale: float = 1.0,
        student_softcap: float | None = None,
        teacher_logit_scales: Sequence[float] | None = None,
        teacher_softcaps: Sequence[float | None] | None = None,
        entropy: bool = False,
    ) -> None:
        """
        Args:
            weighting: a name, or weights (K,) or (K, ...), which become a buffer; all others as in `camkd_loss`.

        Raises:
            ValueError, TypeError: naming the argument and its value.
        """
        super().__init__()
        self.temperature, self.hard_weight, self.soft_weight = temperature, hard_weight, soft_weight
        self.weighting, self.ignore_index = weighting, ignore_index
        self.divergence, self.scale_by_t2, self.z_loss_weight = divergence, scale_by_t2, z_loss_weight
        self.student_logit_scale, self.student_softcap = student_logit_scale, student_softcap
        self.teacher_logit_scales, self.teacher_softcaps = teacher_logit_scales, teacher_softcaps
        self.entropy = entropy
        self.formula.checked()
        check_choice("reduction", reduction, checks.REDUCTIONS)
        check_choice("backend", backend, ("auto", *BACKENDS))
        self.reduction, self.backend = reduction, backend

    def __setattr__(self, name: str, value: Any) -> None:
        """A `weighting` may be a name, an nn.Parameter, which is learned, or a tensor, which becomes a buffer."""
        if name in Formula._fields:
            self.__dict__.pop("_formula", None)
        if name == "weighting":
            for store in (self.__dict__, self._parameters, self._buffers):
                store.pop(name, None)
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                return self.register_buffer(name, value)
        super().__setattr__(name, value)

    @property
    def formula(self) -> Formula:
        """The constants as they are now: attributes may be changed between calls."""
        known: Formula | None = self.__dict__.get("_formula")
        if known is None:
            known = Formula(*(getattr(self, name) for name in Formula._fields))
            if isinstance(known.weighting, str):  # a buffer is replaced without notice, by .to() for example
                self.__dict__["_formula"] = known
        return known

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | Sequence[Tensor],
        target: Tensor,
        num_items: float | Tensor | None = None,
        second_target: Tensor | None = None,
        mix: Tensor | None = None,
    ) -> CAMKDOutput:
        """See `camkd_loss`."""
        second = second_labels(second_target, mix)
        return _differentiable_loss(
            student_logits, teacher_logits, target, second, self.formula, self.reduction, num_items, self.backend
        )

    def extra_repr(self) -> str:
        values = self.formula.replaced(weighting=self.formula.weighting_name()).options()
        values |= {"reduction": self.reduction, "backend": self.backend}
        return ", ".join(f"{name}={value}" for name, value in values.items())
