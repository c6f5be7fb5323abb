"""The feature loss: weights, autograd and value-and-gradient forms (arXiv 2201.00007, eq. 5 and 6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..backends.contract import SecondLabels
from ..backends.reference import accumulation_dtype, feature_rows
from . import checks
from .confidence_op import confidence_in_one_call, confidence_rows
from .entry import Way, computing, enter, way_of_call
from .feature_op import (
    FeatureCall,
    FeatureOptions,
    feature_loss_and_grad,
    feature_loss_rows,
    feature_loss_sum,
    loss_and_grad_in_one_call,
    loss_in_one_call,
)
from .feature_weights import ConstantWeights, checked_divisor, checked_logits, constant_weights
from .formula import check_choice, check_ignore_index, check_number
from .layout import second_arguments, second_labels
from .scale_plan import as_scale


def confidence_weights(
    logits: Tensor | Sequence[Tensor],
    target: Tensor,
    ignore_index: int = -100,
    backend: str = "auto",
    second_target: Tensor | None = None,
    mix: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Confidence weights of K sets of logits: w_k = (1 - softmax_k(CE_k)) / (K - 1)  (eq. 3 and 5).

    Args:
        logits: K tensors (..., C), dtypes may differ, or one (K, ..., C) tensor; K from 1 to 16.
        target: (...) int64 labels in [0, C), or `ignore_index`, whose rows get weights and cross-entropies of 0.
        backend, second_target, mix: as in `camkd_loss`.

    Returns:
        (weights, ce): both (K, ...) in the accumulation dtype, differentiable once with respect to the logits.

    Raises:
        ValueError, TypeError, NotImplementedError: as `camkd_loss`.
    """
    second = second_labels(second_target, mix)
    found = confidence_in_one_call(logits, target, second, ignore_index, backend)
    if found is not None:
        return found
    way, (logits, target, *others) = enter(
        way_of_call(), backend, logits=logits, target=target, **second_arguments(second)
    )
    second = second_labels(*others)
    tensors = checked_logits(logits, target, second)
    check_ignore_index(ignore_index)
    with computing(way, logits=tensors, target=target, **second_arguments(second)):
        weights, ce = confidence_rows(tensors, target, second, int(ignore_index), backend, way)
        shape = (len(tensors), *target.shape)
        return weights.view(shape), ce.view(shape)


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
        backend: as in `camkd_loss`.

    Returns:
        A scalar, or (N,) for reduction="none", in the accumulation dtype; differentiable once.

    Raises:
        ValueError, TypeError, NotImplementedError: as `camkd_loss`.
    """
    check_choice("reduction", reduction, checks.REDUCTIONS)
    return scaled_feature_loss(student_features, teacher_features, weights, reduction, None, backend)


def scaled_feature_loss(
    student_features: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    weights: Tensor,
    reduction: str,
    scale: float | Tensor | None,
    backend: str,
) -> Tensor:
    """`weighted_feature_loss`; a `scale`, a number or (1,), takes the place of 1 / N in "mean"."""
    found = loss_in_one_call(student_features, teacher_features, weights, reduction, scale, backend)
    if found is not None:
        return found
    way, (student_features, teacher_features, weights) = enter(
        way_of_call(),
        backend,
        student_features=student_features,
        teacher_features=teacher_features,
        weights=weights,
    )
    student, teachers = _checked_maps(student_features, teacher_features)
    checks.check_floating("weights", weights)
    N = student[0].shape[0]
    if weights.shape != (len(student), N):
        raise ValueError(f"weights has shape {tuple(weights.shape)}, but the features expect {(len(student), N)}")
    checks.check_device("weights", weights, "student_features[0]", student[0])
    with computing(way, student_features=student, teacher_features=teachers, weights=weights):
        dtype = accumulation_dtype(student[0].dtype)
        call = FeatureCall(student, teachers, weights.to(dtype), backend)
        if reduction == "none":
            return feature_loss_rows(call, way)
        if scale is None:
            scale = 1.0 / max(N, 1) if reduction == "mean" else 1.0
        # A number that depends on a traced batch size stays one.
        scale = as_scale(scale, dtype, weights.device) if isinstance(scale, Tensor) else scale
        return feature_loss_sum(call, scale, way)


def _checked_maps(
    student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    student = checks.as_teacher_list("student_features", student_features)
    teachers = checks.as_teacher_list("teacher_features", teacher_features)
    checks.check_features(student, teachers)
    return student, teachers


class FeatureLossOutput(NamedTuple):
    """The result of CAMKDFeatureLoss and camkd_feature_loss_and_grad."""

    loss: Tensor  # mean over the samples that are not ignored, or sum / num_items; differentiable in the module
    weights: Tensor  # (K, N): w_k^inter; detached unless detach_weights=False
    teacher_ce: Tensor | None  # (K, N): CE(head_k(r_k(F_s)), y), detached like `weights`; None without logits


def camkd_feature_loss_and_grad(
    student_features: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    logits: Tensor | Sequence[Tensor] | None,
    target: Tensor,
    *,
    beta: float = 1.0,
    weighting: str | Tensor = "confidence",
    reduction: str = "mean",
    ignore_index: int = -100,
    num_items: float | Tensor | None = None,
    loss_scale: float | Tensor = 1.0,
    backend: str = "auto",
    second_target: Tensor | None = None,
    mix: Tensor | None = None,
) -> tuple[FeatureLossOutput, list[Tensor]]:
    """The feature loss of CA-MKD and d(loss_scale * loss) / d student_features in one pass over the maps  (eq. 5, 6).

    loss = beta * sum_k w_k * mean_{d,h,w} (F_k - r_k)^2 per sample, the weights being constants. Records no graph; pass
    the result to `torch.autograd.backward(student_features, grads)`.

    Args:
        student_features: K tensors r_k (N, D_k, H_k, W_k), or any (N, ...), of one floating dtype and any layout.
        teacher_features: K tensors F_k, each of its r_k's shape; dtypes and layouts may differ.
        logits: K tensors (N, C), teacher k's head applied to r_k, for weighting="confidence"; otherwise not looked at.
        target: (N,) int64 labels in [0, C), or `ignore_index`, whose samples have weight 0.
        beta: coefficient of the loss (paper: 50).
        weighting: "confidence" (the paper), "uniform" (1/K), or weights (K,) or (K, N).
        reduction: "mean" over the samples that are not ignored, "sum", or "none" (the gradient of each one's own loss).
        ignore_index: the label of samples that do not count.
        num_items: divisor of "mean" instead of the number of samples (gradient accumulation, data parallel).
        loss_scale: multiplies the gradient only (a GradScaler's scale: a number or a one-element tensor).
        backend: as in `camkd_loss`.
        second_target, mix: second labels (N,) of the samples, as in `camkd_loss`, for weighting="confidence".

    Returns:
        (output, grads): the loss, (N,) for reduction="none", and K gradients in the student's shapes and memory order.

    Raises:
        ValueError, TypeError, NotImplementedError: as `camkd_loss_and_grad`.
    """
    options = FeatureOptions(beta, weighting, reduction, num_items, ignore_index, loss_scale)
    second = second_labels(second_target, mix)
    given = student_features, teacher_features, logits, target, second, options, backend
    found = loss_and_grad_in_one_call(*given)
    return _loss_and_grad(*given) if found is None else (FeatureLossOutput(*found[:3]), found[3])


def _loss_and_grad(
    student_features: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    logits: Tensor | Sequence[Tensor] | None,
    target: Tensor,
    second: SecondLabels | None,
    options: FeatureOptions,
    backend: str,
) -> tuple[FeatureLossOutput, list[Tensor]]:
    """The general path of `camkd_feature_loss_and_grad`."""
    beta, weighting, reduction, num_items, ignore_index, loss_scale = options
    way, (student_features, teacher_features, logits, target, weighting, num_items, loss_scale, *others) = enter(
        way_of_call(),
        backend,
        student_features=student_features,
        teacher_features=teacher_features,
        logits=logits,
        target=target,
        weighting=weighting,
        num_items=num_items,
        loss_scale=loss_scale,
        **second_arguments(second),
    )
    second = second_labels(*others)
    student, teachers = _checked_maps(student_features, teacher_features)
    checks.check_sample_target(target, second, student[0], "student_features[0]")
    check_number("beta", beta, positive=False)
    checks.check_scale("loss_scale", loss_scale)
    divisor = checked_divisor(reduction, num_items, ignore_index)
    named = second_arguments(second) | {"logits": logits, "target": target}
    with computing(way, student_features=student, teacher_features=teachers, **named):
        dtype = accumulation_dtype(student[0].dtype)
        constant = constant_weights(weighting, logits, target, second, len(student), divisor, backend, dtype, way)
        weights = constant.weights.to(dtype)
        call = FeatureCall([r.detach() for r in student], teachers, weights, backend)
        return _with_constant_weights(call, constant, float(beta), loss_scale, reduction, way)


def _with_constant_weights(
    call: FeatureCall, constant: ConstantWeights, beta: float, loss_scale: float | Tensor, reduction: str, way: Way
) -> tuple[FeatureLossOutput, list[Tensor]]:
    dtype, device = accumulation_dtype(call.student[0].dtype), call.student[0].device
    scale = as_scale(constant.inverse, dtype, device) * beta
    found = feature_loss_and_grad(call, scale, as_scale(loss_scale, dtype, device), way)
    loss = feature_rows(call.weights, found.error) * scale if reduction == "none" else found.loss
    return FeatureLossOutput(loss, constant.weights, constant.teacher_ce), found.grads
