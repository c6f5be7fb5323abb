"""Confidence weights and feature errors as differentiable calls: in eager mode a torch.autograd.Function around the
backend, for torch.compile a registered op, opaque, with a fake and the same formula of its gradient.

As in `logit_op`: crossing an op boundary costs, right after other work, as much as reading some MB of features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks
from .dispatch import backend_for
from .reference import accumulation_dtype, ce_gradient
from .rows import contiguous_labels, first_order, row_view

# --- confidence weights ----------------------------------------------------------------------------------------------


def _confidence_forward(
    logits: Sequence[Tensor], target: Tensor, ignore_index: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """weights, ce and log-sum-exp, each (K, N)."""
    labels = contiguous_labels(target)
    if not target.is_cuda:
        checks.count_labels(labels, logits[0].shape[-1], ignore_index)
    return backend_for(backend, logits).confidence_forward([row_view(z) for z in logits], labels, ignore_index)


def _confidence_backward(
    logits: Sequence[Tensor], target: Tensor, lse: Tensor, grad_ce: Tensor, backend: str
) -> list[Tensor]:
    rows = [row_view(z) for z in logits]
    grads = backend_for(backend, logits).confidence_backward(rows, contiguous_labels(target), lse, grad_ce)
    return [grad.view(z.shape) for grad, z in zip(grads, logits, strict=True)]


def _grad_ce(target: Tensor, ignore_index: int, weights: Tensor, grad_weights: Tensor, grad_ce: Tensor) -> Tensor:
    """d loss / d CE_k through the weights and through the cross-entropies themselves, 0 on ignored rows: (K, N)."""
    total = ce_gradient(weights, grad_weights, grad_ce)
    return total.masked_fill(target.reshape(-1) == ignore_index, 0.0)


class _Confidence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, target: Tensor, ignore_index: int, backend: str, *logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, ce, lse = _confidence_forward(logits, target, ignore_index, backend)
        ctx.save_for_backward(*logits, target, weights, lse)
        ctx.ignore_index, ctx.backend = ignore_index, backend
        return weights, ce

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_weights: Tensor, grad_ce: Tensor) -> tuple[Any, ...]:
        *logits, target, weights, lse = ctx.saved_tensors
        total = _grad_ce(target, ctx.ignore_index, weights, grad_weights, grad_ce)
        return None, None, None, *_confidence_backward(logits, target, lse, total, ctx.backend)


_confidence_op = torch.library.custom_op("camkd_fast::confidence_weights", _confidence_forward, mutates_args=())
_confidence_backward_op = torch.library.custom_op(
    "camkd_fast::confidence_weights_backward", _confidence_backward, mutates_args=()
)


@_confidence_op.register_fake
def _(logits: Sequence[Tensor], target: Tensor, ignore_index: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(logits[0].dtype)
    weights, ce, lse = (logits[0].new_empty((len(logits), target.numel()), dtype=dtype) for _ in range(3))
    return weights, ce, lse


@_confidence_backward_op.register_fake
def _(logits: Sequence[Tensor], target: Tensor, lse: Tensor, grad_ce: Tensor, backend: str) -> list[Tensor]:
    return [z.new_empty(z.shape) for z in logits]


def _confidence_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, ignore_index, backend = inputs
    weights, _, lse = output
    ctx.save_for_backward(*logits, target, weights, lse)
    ctx.ignore_index, ctx.backend = ignore_index, backend
    ctx.mark_non_differentiable(lse)


@first_order
def _confidence_op_backward(ctx: Any, grad_weights: Tensor, grad_ce: Tensor, _: Tensor) -> tuple[Any, ...]:
    *logits, target, weights, lse = ctx.saved_tensors
    total = _grad_ce(target, ctx.ignore_index, weights, grad_weights, grad_ce)
    return _confidence_backward_op(logits, target, lse, total, ctx.backend), None, None, None


_confidence_op.register_autograd(_confidence_op_backward, setup_context=_confidence_setup)


def confidence_rows(logits: Sequence[Tensor], target: Tensor, ignore_index: int, backend: str) -> tuple[Tensor, Tensor]:
    """Weights and cross-entropies, each (K, N), of checked logits; differentiable once with respect to the logits."""
    if torch.compiler.is_compiling():
        weights, ce, _ = _confidence_op(list(logits), target, ignore_index, backend)
        return weights, ce
    if not _wants_grad(logits):
        return _confidence_forward(logits, target, ignore_index, backend)[:2]
    result: tuple[Tensor, Tensor] = _Confidence.apply(target, ignore_index, backend, *logits)  # type: ignore[no-untyped-call]
    return result


def _wants_grad(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


# --- feature errors --------------------------------------------------------------------------------------------------


def _sample_rows(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both features as (N, M) rows in one memory order; a view unless their memory formats differ."""
    channels_last = (
        student.dim() == 4 and not student.is_contiguous() and student.is_contiguous(memory_format=torch.channels_last)
    )
    order = (0, 2, 3, 1) if channels_last else tuple(range(student.dim()))
    s, t = (x.permute(order).flatten(1) for x in (student, teacher))
    return row_view(s), row_view(t)


def _like_feature(rows: Tensor, feature: Tensor) -> Tensor:
    """(N, M) rows back in the feature's shape and memory format (see `_sample_rows`)."""
    if feature.dim() == 4 and not feature.is_contiguous() and feature.is_contiguous(memory_format=torch.channels_last):
        N, D, H, W = feature.shape
        return rows.view(N, H, W, D).permute(0, 3, 1, 2)
    return rows.view(feature.shape)


def _feature_forward(student: Sequence[Tensor], teachers: Sequence[Tensor], backend: str) -> Tensor:
    """error (K, N): the mean squared difference of each sample and teacher."""
    pairs = [_sample_rows(r, f) for r, f in zip(student, teachers, strict=True)]
    return backend_for(backend, [*student, *teachers]).feature_forward([p[0] for p in pairs], [p[1] for p in pairs])


def _feature_backward(
    student: Sequence[Tensor], teachers: Sequence[Tensor], grad_error: Tensor, backend: str
) -> list[Tensor]:
    pairs = [_sample_rows(r, f) for r, f in zip(student, teachers, strict=True)]
    grads = backend_for(backend, [*student, *teachers]).feature_backward(
        [p[0] for p in pairs], [p[1] for p in pairs], grad_error
    )
    return [_like_feature(grad, r) for grad, r in zip(grads, student, strict=True)]


class _FeatureError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, teachers: Sequence[Tensor], *student: Tensor) -> Tensor:
        ctx.save_for_backward(*student, *teachers)
        ctx.backend = backend
        return _feature_forward(student, teachers, backend)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_error: Tensor) -> tuple[Any, ...]:
        K = len(ctx.saved_tensors) // 2
        grads = _feature_backward(ctx.saved_tensors[:K], ctx.saved_tensors[K:], grad_error, ctx.backend)
        return None, None, *grads


_feature_op = torch.library.custom_op("camkd_fast::feature_error", _feature_forward, mutates_args=())
_feature_backward_op = torch.library.custom_op("camkd_fast::feature_error_backward", _feature_backward, mutates_args=())


@_feature_op.register_fake
def _(student: Sequence[Tensor], teachers: Sequence[Tensor], backend: str) -> Tensor:
    dtype = accumulation_dtype(student[0].dtype)
    return student[0].new_empty((len(student), student[0].shape[0]), dtype=dtype)


@_feature_backward_op.register_fake
def _(student: Sequence[Tensor], teachers: Sequence[Tensor], grad_error: Tensor, backend: str) -> list[Tensor]:
    return [_like_feature(r.new_empty((r.shape[0], math.prod(r.shape[1:]))), r) for r in student]


def _feature_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    student, teachers, backend = inputs
    ctx.save_for_backward(*student, *teachers)
    ctx.backend = backend


@first_order
def _feature_op_backward(ctx: Any, grad_error: Tensor) -> tuple[Any, ...]:
    K = len(ctx.saved_tensors) // 2
    student, teachers = ctx.saved_tensors[:K], ctx.saved_tensors[K:]
    return _feature_backward_op(student, teachers, grad_error, ctx.backend), [None] * K, None


_feature_op.register_autograd(_feature_op_backward, setup_context=_feature_setup)


def feature_error(student: Sequence[Tensor], teachers: Sequence[Tensor], backend: str) -> Tensor:
    """error (K, N) of checked features, in the accumulation dtype; differentiable once with respect to the student."""
    if torch.compiler.is_compiling():
        error: Tensor = _feature_op(list(student), list(teachers), backend)
        return error
    if not _wants_grad(student):
        return _feature_forward(student, teachers, backend)
    result: Tensor = _FeatureError.apply(backend, teachers, *student)  # type: ignore[no-untyped-call]
    return result
