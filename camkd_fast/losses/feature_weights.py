"""The weights of the feature loss as constants, and the divisor of its mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.contract import SecondLabels
from . import checks
from .confidence_op import confidence_and_divisor
from .entry import Way, computing, enter, way_of_call
from .formula import check_choice, check_ignore_index
from .layout import second_arguments, second_labels, weight_rows
from .scale_plan import inverse_divisor

FEATURE_WEIGHTINGS = ("confidence", "uniform")


class ConstantWeights(NamedTuple):
    """Weights without a graph."""

    weights: Tensor  # (K, N), 0 for ignored samples
    teacher_ce: Tensor | None  # (K, N), if the weights follow from logits
    inverse: float | Tensor  # 1 / divisor of the mean: a number, or (1,) on the device


class Divisor(NamedTuple):
    """What the divisor of a reduction depends on."""

    reduction: str
    num_items: float | Tensor | None
    ignore_index: int

    def checked(self) -> Divisor:
        """The same with Python's int for ignore_index; raises TypeError or ValueError."""
        check_choice("reduction", self.reduction, checks.REDUCTIONS)
        checks.check_num_items(self.num_items, self.reduction)
        check_ignore_index(self.ignore_index)
        return Divisor(self.reduction, self.num_items, int(self.ignore_index))

    def counts(self) -> bool:
        """Whether it is the number of valid samples."""
        return self.reduction == "mean" and self.num_items is None

    def inverse(self, target: Tensor, dtype: torch.dtype) -> float | Tensor:
        """1 / divisor; 1 for other reductions than "mean"."""
        if self.reduction != "mean":
            return 1.0
        return inverse_divisor(self.num_items, None, target, self.ignore_index, dtype)


def checked_logits(logits: Tensor | Sequence[Tensor], target: Tensor, second: SecondLabels | None) -> list[Tensor]:
    """K sets of logits for these labels as a list."""
    tensors = checks.as_teacher_list("logits", logits)
    checks.check_classes("logits[0]", tensors[0])
    for k, tensor in enumerate(tensors):
        checks.check_floating(f"logits[{k}]", tensor)
        checks.check_same_logits(f"logits[{k}]", tensor, "logits[0]", tensors[0])
    checks.check_target(target, second, tensors[0], "logits[0]")
    return tensors


def weights_of_logits(
    logits: Sequence[Tensor],
    target: Tensor,
    second: SecondLabels | None,
    divisor: Divisor,
    backend: str,
    dtype: torch.dtype,
    way: Way | None = None,
) -> ConstantWeights:
    """Confidence weights of K checked sets of logits (N, C).

    Args:
        dtype: of the divisor.
        way: of the call; None if its tensors have not been through `enter`.
    """
    if way is None:
        logits = checked_logits(logits, target, second)
        way, (logits, target, *others) = enter(
            way_of_call(), backend, logits=logits, target=target, **second_arguments(second)
        )
        second = second_labels(*others)
    with computing(way, logits=logits, target=target, **second_arguments(second)):
        weights, ce, inverse = confidence_and_divisor(
            logits, target, second, divisor.ignore_index, backend, way, divisor.counts()
        )
        return ConstantWeights(weights, ce, inverse if divisor.counts() else divisor.inverse(target, dtype))


def constant_weights(
    weighting: str | Tensor,
    logits: Tensor | Sequence[Tensor] | None,
    target: Tensor,
    second: SecondLabels | None,
    K: int,
    divisor: Divisor,
    backend: str,
    dtype: torch.dtype,
    way: Way,
) -> ConstantWeights:
    """Weights of K maps by "confidence" from K sets of logits, by "uniform", or from a tensor (K,) or (K, N).

    Args:
        dtype: of the divisor, and of uniform weights.

    Raises:
        ValueError, TypeError: `weighting` is none of these, or K sets of logits are missing.
    """
    if isinstance(weighting, Tensor):
        return _given_weights(weighting, target, K, divisor, dtype)
    check_choice("weighting", weighting, FEATURE_WEIGHTINGS)
    if weighting == "uniform":
        kept = target != divisor.ignore_index
        weights = (kept.to(dtype) / K).expand(K, target.shape[0])
        return ConstantWeights(weights, None, divisor.inverse(target, dtype))
    if logits is None:
        raise ValueError(f"logits is None, but weighting='confidence' needs {K} tensors (N, C)")
    tensors = checked_logits(logits, target, second)
    if len(tensors) != K:
        raise ValueError(f"logits holds {len(tensors)} tensors, but student_features holds {K}")
    return weights_of_logits(tensors, target, second, divisor, backend, dtype, way)


def _given_weights(weighting: Tensor, target: Tensor, K: int, divisor: Divisor, dtype: torch.dtype) -> ConstantWeights:
    N, ignored = target.shape[0], target == divisor.ignore_index
    checks.check_weighting(weighting, K, (N,), "target", target)
    weights = weight_rows(weighting.detach(), K, N, weighting.dtype).masked_fill(ignored, 0.0)
    return ConstantWeights(weights, None, divisor.inverse(target, dtype))
