"""The feature loss: confidence_weights, weighted_feature_loss and CAMKDFeatureLoss (arXiv 2201.00007, eq. 5 and 6)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks
from .dispatch import MAX_TEACHERS, backend_for
from .reference import accumulation_dtype, ce_gradient
from .rows import contiguous_labels, first_order, row_view

# --- confidence weights ----------------------------------------------------------------------------------------------


@torch.library.custom_op("camkd_fast::confidence_weights", mutates_args=())
def _confidence_op(
    logits: Sequence[Tensor], target: Tensor, ignore_index: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """weights, ce and log-sum-exp, each (K, N)."""
    labels = contiguous_labels(target)
    if not target.is_cuda:
        checks.count_labels(labels, logits[0].shape[-1], ignore_index)
    return backend_for(backend, logits).confidence_forward([row_view(z) for z in logits], labels, ignore_index)


@_confidence_op.register_fake
def _(logits: Sequence[Tensor], target: Tensor, ignore_index: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(logits[0].dtype)
    weights, ce, lse = (logits[0].new_empty((len(logits), target.numel()), dtype=dtype) for _ in range(3))
    return weights, ce, lse


@torch.library.custom_op("camkd_fast::confidence_weights_backward", mutates_args=())
def _confidence_backward_op(
    logits: Sequence[Tensor], target: Tensor, lse: Tensor, grad_ce: Tensor, backend: str
) -> list[Tensor]:
    rows = [row_view(z) for z in logits]
    grads = backend_for(backend, logits).confidence_backward(rows, contiguous_labels(target), lse, grad_ce)
    return [grad.view(z.shape) for grad, z in zip(grads, logits, strict=True)]


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
def _confidence_backward(ctx: Any, grad_weights: Tensor, grad_ce: Tensor, _: Tensor) -> tuple[Any, ...]:
    *logits, target, weights, lse = ctx.saved_tensors
    total = ce_gradient(weights, grad_weights, grad_ce)
    total = total.masked_fill(target.reshape(-1) == ctx.ignore_index, 0.0)
    return _confidence_backward_op(logits, target, lse, total, ctx.backend), None, None, None


_confidence_op.register_autograd(_confidence_backward, setup_context=_confidence_setup)


def confidence_weights(
    logits: Tensor | Sequence[Tensor], target: Tensor, ignore_index: int = -100, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Confidence weights of K sets of logits: w_k = (1 - softmax_k(CE_k)) / (K - 1)  (eq. 3 and 5).

    Args:
        logits: K tensors (..., C), dtypes may differ, or one (K, ..., C) tensor; K from 1 to 16.
        target: (...) int64 labels in [0, C), or `ignore_index`, whose rows get weights and cross-entropies of 0.

    Returns:
        (weights, ce): both (K, ...) in the accumulation dtype, differentiable once with respect to the logits.

    Raises:
        ValueError, TypeError, NotImplementedError: as `camkd_loss`.
    """
    tensors = checks.as_teacher_list("logits", logits)
    checks.check_classes("logits[0]", tensors[0])
    for k, tensor in enumerate(tensors):
        checks.check_floating(f"logits[{k}]", tensor)
        checks.check_same_logits(f"logits[{k}]", tensor, "logits[0]", tensors[0])
    checks.check_target(target, tensors[0], "logits[0]")
    checks.check_ignore_index(ignore_index)
    weights, ce, _ = _confidence_op(tensors, target, ignore_index, backend)
    shape = (len(tensors), *target.shape)
    return weights.view(shape), ce.view(shape)


# --- weighted feature regression -------------------------------------------------------------------------------------


def _sample_rows(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both features as (N, M) rows in one memory order; a view unless their memory formats differ."""
    channels_last = (
        student.dim() == 4 and not student.is_contiguous() and student.is_contiguous(memory_format=torch.channels_last)
    )
    order = (0, 2, 3, 1) if channels_last else tuple(range(student.dim()))
    s, t = (x.permute(order).flatten(1) for x in (student, teacher))
    return row_view(s), row_view(t)


@torch.library.custom_op("camkd_fast::feature_error", mutates_args=())
def _feature_op(student: Sequence[Tensor], teachers: Sequence[Tensor], backend: str) -> Tensor:
    """error (K, N): the mean squared difference of each sample and teacher."""
    pairs = [_sample_rows(r, f) for r, f in zip(student, teachers, strict=True)]
    return backend_for(backend, [*student, *teachers]).feature_forward([p[0] for p in pairs], [p[1] for p in pairs])


@_feature_op.register_fake
def _(student: Sequence[Tensor], teachers: Sequence[Tensor], backend: str) -> Tensor:
    dtype = accumulation_dtype(student[0].dtype)
    return student[0].new_empty((len(student), student[0].shape[0]), dtype=dtype)


@torch.library.custom_op("camkd_fast::feature_error_backward", mutates_args=())
def _feature_backward_op(
    student: Sequence[Tensor], teachers: Sequence[Tensor], grad_error: Tensor, backend: str
) -> list[Tensor]:
    pairs = [_sample_rows(r, f) for r, f in zip(student, teachers, strict=True)]
    grads = backend_for(backend, [*student, *teachers]).feature_backward(
        [p[0] for p in pairs], [p[1] for p in pairs], grad_error
    )
    return [_like_feature(grad, r) for grad, r in zip(grads, student, strict=True)]


def _like_feature(rows: Tensor, feature: Tensor) -> Tensor:
    """(N, M) rows back in the feature's shape and memory format (see `_sample_rows`)."""
    if feature.dim() == 4 and not feature.is_contiguous() and feature.is_contiguous(memory_format=torch.channels_last):
        N, D, H, W = feature.shape
        return rows.view(N, H, W, D).permute(0, 3, 1, 2)
    return rows.view(feature.shape)


@_feature_backward_op.register_fake
def _(student: Sequence[Tensor], teachers: Sequence[Tensor], grad_error: Tensor, backend: str) -> list[Tensor]:
    return [_like_feature(r.new_empty((r.shape[0], math.prod(r.shape[1:]))), r) for r in student]


def _feature_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    student, teachers, backend = inputs
    ctx.save_for_backward(*student, *teachers)
    ctx.backend = backend


@first_order
def _feature_backward(ctx: Any, grad_error: Tensor) -> tuple[Any, ...]:
    K = len(ctx.saved_tensors) // 2
    student, teachers = ctx.saved_tensors[:K], ctx.saved_tensors[K:]
    grads = _feature_backward_op(student, teachers, grad_error, ctx.backend)
    return grads, [None] * K, None


_feature_op.register_autograd(_feature_backward, setup_context=_feature_setup)


def weighted_feature_loss(
    student_features: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    weights: Tensor,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """sum_k w_k * mean_{d,h,w} (F_k - r_k)^2 per sample, reduced over samples  (eq. 6).

    Args:
        student_features: K tensors r_k (N, D_k, H_k, W_k), or any (N, ...), of one floating dtype.
        teacher_features: K tensors F_k, each of its r_k's shape. No gradient.
        weights: (K, N), differentiable.
        reduction: "mean" over samples, "sum", or "none".

    Returns:
        A scalar, or (N,) for reduction="none", in the accumulation dtype; differentiable once.

    Raises:
        ValueError, TypeError, NotImplementedError: as `camkd_loss`.
    """
    student = checks.as_teacher_list("student_features", student_features)
    teachers = checks.as_teacher_list("teacher_features", teacher_features)
    checks.check_features(student, teachers)
    checks.check_floating("weights", weights)
    checks.check_choice("reduction", reduction, checks.REDUCTIONS)
    expected = (len(student), student[0].shape[0])
    if weights.shape != expected:
        raise ValueError(f"weights has shape {tuple(weights.shape)}, but the features expect {expected}")
    checks.check_device("weights", weights, "student_features[0]", student[0])
    error: Tensor = _feature_op(student, teachers, backend)
    loss = (weights.to(error.dtype) * error).sum(0)
    if reduction == "none":
        return loss
    return loss.sum() / max(loss.numel(), 1) if reduction == "mean" else loss.sum()


class FeatureLossOutput(NamedTuple):
    """What CAMKDFeatureLoss returns."""

    loss: Tensor  # mean over the samples that are not ignored, or sum / num_items; a scalar, differentiable
    weights: Tensor  # (K, N): w_k^inter; detached unless detach_weights=False
    teacher_ce: Tensor  # (K, N): CE(head_k(r_k(F_s)), y), detached like `weights`


class CAMKDFeatureLoss(nn.Module):
    """The intermediate loss of CA-MKD (eq. 5 and 6), with the K feature maps r_k as its parameters.

    r_k = ReLU(BatchNorm(1x1 convolution)) of the student's last feature map, resized to teacher k's H x W; the weights
    are the confidence weights of head_k(r_k(F_s)), teacher k's own pooling and classifier.

    Args:
        student_channels: D of the student's feature map.
        teacher_channels: D_k of each teacher's feature map; K from 1 to 16.
        detach_weights: cut the gradient through the weights (the paper does not say; the official code keeps it).
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: Sequence[int],
        detach_weights: bool = True,
        ignore_index: int = -100,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not 1 <= len(teacher_channels) <= MAX_TEACHERS:
            raise ValueError(f"teacher_channels must hold 1 to {MAX_TEACHERS}, got {len(teacher_channels)}")
        self.detach_weights, self.ignore_index, self.backend = detach_weights, ignore_index, backend
        self.regressors = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(student_channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
            )
            for channels in teacher_channels
        )

    def regress(self, student_feature: Tensor, teacher_features: Sequence[Tensor]) -> list[Tensor]:
        """r_k(F_s) for every teacher, each resized from the original map (N, D, H, W) to (N, D_k, H_k, W_k)."""
        regressed = []
        for regressor, feature in zip(self.regressors, teacher_features, strict=True):
            regressed.append(regressor(_resize(student_feature, feature.shape[-2:])))
        return regressed

    def forward(
        self,
        student_feature: Tensor,
        teacher_features: Sequence[Tensor],
        teacher_heads: Sequence[Callable[[Tensor], Tensor]],
        target: Tensor,
        num_items: float | Tensor | None = None,
    ) -> FeatureLossOutput:
        """
        Args:
            student_feature: (N, D, H, W).
            teacher_features: K tensors (N, D_k, H_k, W_k), no gradient.
            teacher_heads: K frozen callables (N, D_k, H_k, W_k) -> logits (N, C).
            target: (N,) int64 labels or `ignore_index`, whose rows have weight 0.
            num_items: divisor of the mean instead of the number of rows, as in `camkd_loss`.

        Raises:
            ValueError: another number of teachers than at construction, and as `weighted_feature_loss`.
        """
        K = len(self.regressors)
        for name, given in (("teacher_features", teacher_features), ("teacher_heads", teacher_heads)):
            if len(given) != K:
                raise ValueError(f"{name} holds {len(given)}, but {K} teachers were named at construction")
        regressed = self.regress(student_feature, teacher_features)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach_weights):
            logits = [head(feature) for head, feature in zip(teacher_heads, regressed, strict=True)]
            weights, ce = confidence_weights(logits, target, self.ignore_index, self.backend)
        total = weighted_feature_loss(regressed, teacher_features, weights, reduction="sum", backend=self.backend)
        loss = total / ((target != self.ignore_index).sum().clamp(min=1) if num_items is None else num_items)
        return FeatureLossOutput(loss, weights, ce)


def _resize(feature: Tensor, size: torch.Size) -> Tensor:
    """To (H, W): average pooling where a side shrinks, nearest neighbour where it grows."""
    H, W = feature.shape[-2:]
    if size[0] < H or size[1] < W:
        feature = F.adaptive_avg_pool2d(feature, (min(size[0], H), min(size[1], W)))
    return feature if feature.shape[-2:] == size else F.interpolate(feature, size=tuple(size), mode="nearest")
