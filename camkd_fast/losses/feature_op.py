"""The feature error by each of the three ways of `entry`, as in `confidence_op`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import reference
from ..backends.dispatch import backend_for
from ..backends.reference import accumulation_dtype
from .autograd import first_order, needs_grad, savable, save, saved
from .entry import Way
from .layout import row_view


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
    grads = backend_for(backend, [*student, *teachers], [grad_error]).feature_backward(
        [p[0] for p in pairs], [p[1] for p in pairs], grad_error
    )
    return [_like_feature(grad, r) for grad, r in zip(grads, student, strict=True)]


class _FeatureError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, teachers: Sequence[Tensor], *student: Tensor) -> Tensor:
        save(ctx, *student, *teachers)
        ctx.backend = backend
        return _feature_forward(student, teachers, backend)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_error: Tensor) -> tuple[Any, ...]:
        features = saved(ctx)
        K = len(features) // 2
        grads = _feature_backward(features[:K], features[K:], grad_error, ctx.backend)
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
    save(ctx, *student, *teachers)
    ctx.backend = backend


@first_order
def _feature_op_backward(ctx: Any, grad_error: Tensor) -> tuple[Any, ...]:
    features = saved(ctx)
    K = len(features) // 2
    return _feature_backward_op(features[:K], features[K:], grad_error, ctx.backend), [None] * K, None


_feature_op.register_autograd(_feature_op_backward, setup_context=_feature_setup)


def feature_error(student: Sequence[Tensor], teachers: Sequence[Tensor], backend: str, way: Way) -> Tensor:
    """error (K, N) of checked features, in the accumulation dtype; differentiable once with respect to the student."""
    if way is Way.OPERATOR:
        error: Tensor = _feature_op(list(student), list(teachers), backend)
        return error
    if way is Way.EXPRESSION:
        return reference.feature_forward([r.flatten(1) for r in student], [savable(f).flatten(1) for f in teachers])
    if not needs_grad(student):
        return _feature_forward(student, teachers, backend)
    result: Tensor = _FeatureError.apply(backend, teachers, *student)  # type: ignore[no-untyped-call]
    return result
