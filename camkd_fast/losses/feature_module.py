"""The feature loss as a module, with the convolutions that map the student's features to the teachers' (eq. 6)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends.contract import MAX_TEACHERS
from ..backends.dispatch import BACKENDS
from ..backends.reference import accumulation_dtype
from . import checks
from .feature import FeatureLossOutput, camkd_feature_loss_and_grad, confidence_weights, scaled_feature_loss
from .feature_weights import weights_of_logits
from .formula import check_choice, check_ignore_index
from .layout import second_labels
from .scale_plan import Divisor


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
        loss = scaled_feature_loss(regressed, teacher_features, weights, "mean", inverse, self.backend)
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
