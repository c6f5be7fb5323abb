"""The feature loss: confidence_weights, weighted_feature_loss and CAMKDFeatureLoss (arXiv 2201.00007, eq. 5 and 6)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends.contract import MAX_TEACHERS
from . import checks
from .autograd import savable
from .confidence_op import confidence_rows
from .entry import computing, enter, way_of_call
from .feature_op import feature_error
from .formula import check_choice, check_ignore_index
from .scale_plan import divisor_of


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
    way, (logits, target) = enter(way_of_call(), backend, logits=logits, target=target)
    tensors = checks.as_teacher_list("logits", logits)
    checks.check_classes("logits[0]", tensors[0])
    for k, tensor in enumerate(tensors):
        checks.check_floating(f"logits[{k}]", tensor)
        checks.check_same_logits(f"logits[{k}]", tensor, "logits[0]", tensors[0])
    checks.check_target(target, tensors[0], "logits[0]")
    check_ignore_index(ignore_index)
    with computing(way, logits=tensors, target=target):
        weights, ce = confidence_rows(tensors, target, int(ignore_index), backend, way)
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

    Returns:
        A scalar, or (N,) for reduction="none", in the accumulation dtype; differentiable once.

    Raises:
        ValueError, TypeError, NotImplementedError: as `camkd_loss`.
    """
    way, (student_features, teacher_features, weights) = enter(
        way_of_call(),
        backend,
        student_features=student_features,
        teacher_features=teacher_features,
        weights=weights,
    )
    student = checks.as_teacher_list("student_features", student_features)
    teachers = checks.as_teacher_list("teacher_features", teacher_features)
    checks.check_features(student, teachers)
    checks.check_floating("weights", weights)
    check_choice("reduction", reduction, checks.REDUCTIONS)
    expected = (len(student), student[0].shape[0])
    if weights.shape != expected:
        raise ValueError(f"weights has shape {tuple(weights.shape)}, but the features expect {expected}")
    checks.check_device("weights", weights, "student_features[0]", student[0])
    with computing(way, student_features=student, teacher_features=teachers, weights=weights):
        error = feature_error(student, teachers, backend, way)
        loss = (savable(weights.to(error.dtype)) * error).sum(0)
        if reduction == "none":
            return loss
        return loss.sum() / max(loss.numel(), 1) if reduction == "mean" else loss.sum()


class FeatureLossOutput(NamedTuple):
    """The result of CAMKDFeatureLoss."""

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
            ValueError: the number of teachers differs from construction; and as `weighted_feature_loss`.
        """
        K = len(self.regressors)
        for name, given in (("teacher_features", teacher_features), ("teacher_heads", teacher_heads)):
            if len(given) != K:
                raise ValueError(f"{name} holds {len(given)}, but the module was built for {K} teachers")
        regressed = self.regress(student_feature, teacher_features)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach_weights):
            logits = [head(feature) for head, feature in zip(teacher_heads, regressed, strict=True)]
            weights, ce = confidence_weights(logits, target, self.ignore_index, self.backend)
        total = weighted_feature_loss(regressed, teacher_features, weights, reduction="sum", backend=self.backend)
        loss = total / self._divisor(target, num_items)
        return FeatureLossOutput(loss, weights, ce)

    def _divisor(self, target: Tensor, num_items: float | Tensor | None) -> float | Tensor:
        checks.check_num_items(num_items, "mean")
        kept = target != self.ignore_index
        if isinstance(num_items, Tensor):
            return divisor_of(num_items.to(target.device), kept.any())
        return kept.sum().clamp(min=1) if num_items is None else float(num_items)


def _resize(feature: Tensor, size: torch.Size) -> Tensor:
    """Resize to (H, W): average pooling for a smaller side, nearest neighbour for a larger one."""
    H, W = feature.shape[-2:]
    if size[0] < H or size[1] < W:
        feature = F.adaptive_avg_pool2d(feature, (min(size[0], H), min(size[1], W)))
    return feature if feature.shape[-2:] == size else F.interpolate(feature, size=tuple(size), mode="nearest")
