"""The feature loss: weights, autograd and value-and-gradient forms, and module (arXiv 2201.00007, eq. 5 and 6)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends.contract import MAX_TEACHERS, SecondLabels
from ..backends.dispatch import BACKENDS
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
from .feature_weights import ConstantWeights, Divisor, checked_logits, constant_weights, weights_of_logits
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
    return _weighted(student_features, teacher_features, weights, reduction, None, backend)


def _weighted(
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
    divisor = Divisor(reduction, num_items, ignore_index).checked()
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


class CAMKDFeatureLoss(nn.Module):
    """The intermediate loss of CA-MKD (eq. 5 and 6), with the K feature maps r_k as its parameters.

    r_k = ReLU(BatchNorm(1x1 convolution)) of the student's last feature map, resized to teacher k's H x W; the weights
    are the confidence weights of head_k(r_k(F_s)), teacher k's own pooling and classifier.

    Args:
        student_channels: D of the student's feature map.
        teacher_channels: D_k of each teacher's feature map; K from 1 to 16.
        detach_weights: cut the gradient through the weights (the paper does not say; the official code keeps it).
        ignore_index: the label of samples that do not count.
        backend: as in `camkd_loss`.

    Raises:
        ValueError, TypeError: naming the argument and its value.
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
        check_ignore_index(ignore_index)
        check_choice("backend", backend, ("auto", *BACKENDS))
        self.detach_weights, self.ignore_index, self.backend = detach_weights, ignore_index, backend
        self.regressors = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(student_channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
            )
            for channels in teacher_channels
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters of the maps r_k."""
        weight: Tensor = self.regressors[0][0].weight  # type: ignore[index]
        return weight.dtype

    def _check_teachers(self, **given: Sequence[object]) -> None:
        K = len(self.regressors)
        for name, values in given.items():
            if len(values) != K:
                raise ValueError(f"{name} holds {len(values)}, but the module was built for {K} teachers")

    def _logits(self, regressed: Sequence[Tensor], heads: Sequence[Callable[[Tensor], Tensor]]) -> list[Tensor]:
        """head_k(r_k), with a graph only if the weights are to have one."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach_weights):
            return [_unchanged(k, r, head) for k, (head, r) in enumerate(zip(heads, regressed, strict=True))]

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
        second_target: Tensor | None = None,
        mix: Tensor | None = None,
    ) -> FeatureLossOutput:
        """
        Args:
            student_feature: (N, D, H, W).
            teacher_features: K tensors (N, D_k, H_k, W_k), no gradient.
            teacher_heads: K frozen callables (N, D_k, H_k, W_k) -> logits (N, C).
            target: (N,) int64 labels or `ignore_index`, whose rows have weight 0.
            num_items: divisor of the mean instead of the number of rows, as in `camkd_loss`.
            second_target, mix: second labels (N,) of the rows, as in `camkd_loss`.

        Raises:
            ValueError: the number of teachers differs from construction, or a head changes its input in place; and as
                `weighted_feature_loss`.
        """
        self._check_teachers(teacher_features=teacher_features, teacher_heads=teacher_heads)
        checks.check_num_items(num_items, "mean")
        divisor = Divisor("mean", num_items, self.ignore_index)
        regressed = self.regress(student_feature, teacher_features)
        logits = self._logits(regressed, teacher_heads)
        if self.detach_weights:
            second = second_labels(second_target, mix)
            dtype = accumulation_dtype(regressed[0].dtype)
            weights, ce, inverse = weights_of_logits(logits, target, second, divisor, self.backend, dtype)
        else:
            weights, ce = confidence_weights(logits, target, self.ignore_index, self.backend, second_target, mix)
            inverse = divisor.inverse(target, weights.dtype)
        loss = _weighted(regressed, teacher_features, weights, "mean", inverse, self.backend)
        return FeatureLossOutput(loss, weights, ce)

    def loss_and_grad(
        self,
        student_feature: Tensor,
        teacher_features: Sequence[Tensor],
        teacher_heads: Sequence[Callable[[Tensor], Tensor]],
        target: Tensor,
        **options: Any,
    ) -> tuple[FeatureLossOutput, list[Tensor], list[Tensor]]:
        """The loss without a graph, the maps r_k in their graph, and d(loss_scale * loss) / d r_k.

        For `torch.autograd.backward(maps, grads)`. The weights are constants, whatever `detach_weights`.

        Args:
            options: keywords of `camkd_feature_loss_and_grad` but those of the module; the rest as in `forward`.

        Returns:
            The output, K maps r_k (N, D_k, H_k, W_k), and their gradients in the same shapes and dtypes.

        Raises:
            ValueError, TypeError, NotImplementedError: as `forward` and `camkd_feature_loss_and_grad`.
        """
        of_module: dict[str, Any] = {"ignore_index": self.ignore_index, "backend": self.backend}
        for name in of_module.keys() & options.keys():
            raise TypeError(f"{name} is {of_module[name]!r} in this module, got {options[name]!r} for a call")
        self._check_teachers(teacher_features=teacher_features, teacher_heads=teacher_heads)
        regressed = self.regress(student_feature, teacher_features)
        weighting = options.get("weighting", "confidence")
        needs_logits = isinstance(weighting, str) and weighting == "confidence"
        logits = self._logits(regressed, teacher_heads) if needs_logits else None
        output, grads = camkd_feature_loss_and_grad(regressed, teacher_features, logits, target, **of_module, **options)
        return output, regressed, grads


def _unchanged(k: int, regressed: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    """head(regressed); the map is compared with the teacher's afterwards."""
    if torch.compiler.is_compiling() or regressed.is_inference():
        return head(regressed)
    version = regressed._version
    logits = head(regressed)
    if regressed._version != version:
        raise ValueError(f"teacher_heads[{k}] changes its input in place: expected modules with inplace=False")
    return logits


def _resize(feature: Tensor, size: torch.Size) -> Tensor:
    """Resize to (H, W): average pooling for a smaller side, nearest neighbour for a larger one."""
    H, W = feature.shape[-2:]
    if size[0] < H or size[1] < W:
        feature = F.adaptive_avg_pool2d(feature, (min(size[0], H), min(size[1], W)))
    return feature if feature.shape[-2:] == size else F.interpolate(feature, size=tuple(size), mode="nearest")
