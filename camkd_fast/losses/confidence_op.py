"""Confidence weights by each of the three ways of `entry`.

KERNEL is a torch.autograd.Function around the backend, since an operator's dispatch costs as much as reading some MB
of features. OPERATOR is a registered operator with a fake and the same gradient formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import reference
from ..backends.contract import SecondLabels, second_pair
from ..backends.dispatch import backend_for, first_of, whole_losses
from ..backends.memory import observer
from ..backends.reference import accumulation_dtype, ce_gradient
from . import checks
from .autograd import first_order, needs_grad, savable, save, saved
from .entry import KERNEL, Way, way_of_call
from .layout import contiguous_labels, row_view, second_labels, second_rows
from .scale_plan import Divisor


def _confidence_forward(
    logits: Sequence[Tensor],
    target: Tensor,
    second_target: Tensor | None,
    mix: Tensor | None,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """weights, ce and log-sum-exp, each (K, N)."""
    second = second_labels(second_target, mix)
    return _forward(logits, target, second, ignore_index, backend, counted=False)[:3]


def _forward(
    logits: Sequence[Tensor],
    target: Tensor,
    second: SecondLabels | None,
    ignore_index: int,
    backend: str,
    counted: bool,
) -> tuple[Tensor, Tensor, Tensor, float | Tensor]:
    """`_confidence_forward`, and if `counted` 1 / number of valid rows (at least 1), else 1.

    Labels in main memory are counted by their check, others by the kernel: a number, or (1,) on the device.
    """
    labels, dtype = contiguous_labels(target), accumulation_dtype(logits[0].dtype)
    second = second_rows(second, dtype)
    rows = [row_view(z) for z in logits]
    valid = checks.count_if_dense(labels, logits[0].shape[-1], ignore_index, second)
    module = backend_for(backend, logits, [labels, *(second or ())])
    if counted and valid is None:
        inverse = torch.empty(1, dtype=dtype, device=target.device)
        return *module.confidence_forward(rows, labels, ignore_index, inverse, second), inverse
    results = module.confidence_forward(rows, labels, ignore_index, second=second)
    return *results, 1.0 / max(valid, 1) if counted and valid is not None else 1.0


def _confidence_backward(
    logits: Sequence[Tensor],
    target: Tensor,
    second_target: Tensor | None,
    mix: Tensor | None,
    lse: Tensor,
    grad_ce: Tensor,
    backend: str,
) -> list[Tensor]:
    rows = [row_view(z) for z in logits]
    labels, second = contiguous_labels(target), second_rows(second_labels(second_target, mix), lse.dtype)
    module = backend_for(backend, logits, [labels, lse, grad_ce, *(second or ())])
    grads = module.confidence_backward(rows, labels, lse, grad_ce, second)
    return [grad.view(z.shape) for grad, z in zip(grads, logits, strict=True)]


def _grad_ce(target: Tensor, ignore_index: int, weights: Tensor, grad_weights: Tensor, grad_ce: Tensor) -> Tensor:
    """d loss / d CE_k through the weights and through the cross-entropies themselves, 0 on ignored rows: (K, N)."""
    total = ce_gradient(weights, grad_weights, grad_ce)
    return total.masked_fill(target.reshape(-1) == ignore_index, 0.0)


class _Confidence(torch.autograd.Function):
    """Attaches the gradient to finished weights and cross-entropies.

    `kept` (2, K, N) holds the log-sum-exps, and the weights again, since the caller may change them in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        finished: tuple[Tensor, Tensor],
        kept: Tensor,
        target: Tensor,
        second: SecondLabels | None,
        ignore_index: int,
        backend: str,
        *logits: Tensor,
    ) -> tuple[Tensor, Tensor]:
        save(ctx, *logits, target, *(second or ()), kept)
        ctx.ignore_index, ctx.backend, ctx.K = ignore_index, backend, len(logits)
        ctx.set_materialize_grads(False)
        return finished

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_weights: Tensor | None, grad_ce: Tensor | None) -> tuple[Any, ...]:
        (*labelled, kept), K = saved(ctx), ctx.K
        logits, target, second = labelled[:K], labelled[K], _saved_labels(labelled[K + 1 :])
        grads = _gradients(logits, target, second, ctx.ignore_index, kept, grad_weights, grad_ce, ctx.backend)
        return (*(None,) * 6, *grads)


def _saved_labels(saved: Sequence[Tensor]) -> SecondLabels | None:
    return SecondLabels(*saved) if saved else None


def _gradients(
    logits: Sequence[Tensor],
    target: Tensor,
    second: SecondLabels | None,
    ignore_index: int,
    kept: Tensor,
    grad_weights: Tensor | None,
    grad_ce: Tensor | None,
    backend: str,
) -> Sequence[Tensor | None]:
    if grad_weights is None and grad_ce is None:
        return [None] * len(logits)
    whole = whole_losses(backend, logits[0])
    if whole is not None and observer() is None:
        found = whole.confidence_gradients(logits, target, ignore_index, kept, grad_weights, grad_ce, second)
        if found is not None:
            return found
    lse, weights = kept.unbind(0)
    of_weights, of_ce = (
        torch.zeros_like(lse) if grad is None else grad.reshape(lse.shape) for grad in (grad_weights, grad_ce)
    )
    total = _grad_ce(target, ignore_index, weights, of_weights, of_ce)
    return _confidence_backward(logits, target, *second_pair(second), lse, total, backend)


_confidence_op = torch.library.custom_op("camkd_fast::confidence_weights", _confidence_forward, mutates_args=())
_confidence_backward_op = torch.library.custom_op(
    "camkd_fast::confidence_weights_backward", _confidence_backward, mutates_args=()
)


@_confidence_op.register_fake
def _(
    logits: Sequence[Tensor],
    target: Tensor,
    second_target: Tensor | None,
    mix: Tensor | None,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(logits[0].dtype)
    weights, ce, lse = (logits[0].new_empty((len(logits), target.numel()), dtype=dtype) for _ in range(3))
    return weights, ce, lse


@_confidence_backward_op.register_fake
def _(
    logits: Sequence[Tensor],
    target: Tensor,
    second_target: Tensor | None,
    mix: Tensor | None,
    lse: Tensor,
    grad_ce: Tensor,
    backend: str,
) -> list[Tensor]:
    return [z.new_empty(z.shape) for z in logits]


def _confidence_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, second_target, mix, ignore_index, backend = inputs
    weights, _, lse = output
    second = [tensor for tensor in (second_target, mix) if tensor is not None]
    save(ctx, *logits, target, *second, weights, lse)
    ctx.ignore_index, ctx.backend, ctx.K = ignore_index, backend, len(logits)
    ctx.mark_non_differentiable(lse)


@first_order
def _confidence_op_backward(ctx: Any, grad_weights: Tensor, grad_ce: Tensor, _: Tensor) -> tuple[Any, ...]:
    (*labelled, weights, lse), K = saved(ctx), ctx.K
    logits, target, second = labelled[:K], labelled[K], _saved_labels(labelled[K + 1 :])
    total = _grad_ce(target, ctx.ignore_index, weights, grad_weights, grad_ce)
    grads = _confidence_backward_op(logits, target, *second_pair(second), lse, total, ctx.backend)
    return grads, *(None,) * 5


_confidence_op.register_autograd(_confidence_op_backward, setup_context=_confidence_setup)


def confidence_rows(
    logits: Sequence[Tensor],
    target: Tensor,
    second: SecondLabels | None,
    ignore_index: int,
    backend: str,
    way: Way,
) -> tuple[Tensor, Tensor]:
    """Weights and cross-entropies, each (K, N), of checked logits; differentiable once with respect to the logits."""
    if way is Way.OPERATOR:
        weights, ce, _ = _confidence_op(list(logits), target, *second_pair(second), ignore_index, backend)
        return weights, ce
    if way is Way.EXPRESSION:
        return _confidence_expression(logits, target, second, ignore_index)
    differentiable = needs_grad(logits)
    with torch.no_grad():
        weights, ce, lse = _confidence_forward(logits, target, *second_pair(second), ignore_index, backend)
        kept = torch.stack([lse, weights]) if differentiable else None
    return _attached((weights, ce), kept, logits, target, second, ignore_index, backend)


def _attached(
    finished: tuple[Tensor, Tensor],
    kept: Tensor | None,
    logits: Sequence[Tensor],
    target: Tensor,
    second: SecondLabels | None,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The results in the graph of the logits; themselves if nothing was kept for a backward."""
    if kept is None:
        return finished
    labels = target, second, ignore_index
    result: tuple[Tensor, Tensor] = _Confidence.apply(finished, kept, *labels, backend, *logits)  # type: ignore[no-untyped-call]
    return result


def confidence_in_one_call(
    logits: Tensor | Sequence[Tensor],
    target: Tensor,
    second: SecondLabels | None,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor] | None:
    """Fast path of `confidence_weights`: one C++ call. Returns None for unsupported or invalid input; the general path
    reports the error.
    """
    if way_of_call() is not KERNEL or isinstance(logits, Tensor):
        return None
    whole = whole_losses(backend, first_of(logits))
    found = None if whole is None else whole.confidence_weights(logits, target, ignore_index, second)
    if found is None:
        return None
    weights, ce, kept = found
    return _attached((weights, ce), kept, logits, target, second, ignore_index, backend)


def confidence_and_divisor(
    logits: Sequence[Tensor],
    target: Tensor,
    second: SecondLabels | None,
    divisor: Divisor,
    backend: str,
    way: Way,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, float | Tensor]:
    """Weights and cross-entropies (K, N) without a graph, and 1 / divisor, a number or (1,).

    Args:
        dtype: of a divisor that is not counted by a kernel.
    """
    logits = [z.detach() for z in logits]
    if way is Way.KERNEL and divisor.counts():
        weights, ce, _, inverse = _forward(logits, target, second, divisor.ignore_index, backend, counted=True)
        return weights, ce, inverse
    weights, ce = confidence_rows(logits, target, second, divisor.ignore_index, backend, way)
    return weights, ce, divisor.inverse(target, dtype)


def _confidence_expression(
    logits: Sequence[Tensor], target: Tensor, second: SecondLabels | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    labels, second = contiguous_labels(target), second_rows(second, accumulation_dtype(logits[0].dtype))
    checks.count_if_dense(labels, logits[0].shape[-1], ignore_index, second)
    rows = [savable(row_view(z)) for z in logits]
    second = None if second is None else SecondLabels(*map(savable, second))
    return reference.confidence_forward(rows, savable(labels), ignore_index, second=second)[:2]
