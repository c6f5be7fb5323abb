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
from .scale_plan import Divisor

FEATURE_WEIGHTINGS = ("confidence", "uniform")


class ConstantWeights(NamedTuple):
    """Weights without a graph."""

    weights: Tensor  # (K, N), 0 for ignored samples
    teacher_ce: Tensor | None  # (K, N), if the weights follow from logits
    inverse: float | Tensor  # 1 / divisor of the mean: a number, or (1,) on the device


def checked_divisor(reduction: str, num_items: float | Tensor | None, ignore_index: int) -> Divisor:
    """The divisor of checked arguments, with Python's int for ignore_index; raises TypeError or ValueError."""
    check_choice("reduction", reduction, checks.REDUCTIONS)
    checks.check_num_items(num_items, reduction)
    check_ignore_index(ignore_index)
    return Divisor(reduction, num_items, int(ignore_index))


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
) -> ConstantWeights:
    """Confidence weights of K sets of logits (N, C) that nobody has looked at yet. `dtype`: of the divisor."""
    way, (logits, target, *others) = enter(
        way_of_call(), backend, logits=logits, target=target, **second_arguments(second)
    )
    second = second_labels(*others)
    tensors = checked_logits(logits, target, second)
    with computing(way, logits=tensors, target=target, **second_arguments(second)):
        return ConstantWeights(*confidence_and_divisor(tensors, target, second, divisor, backend, way, dtype))


def uniform_weights(target: Tensor, K: int, divisor: Divisor, dtype: torch.dtype) -> ConstantWeights:
    """1 / K for each of K maps. `dtype`: of weights and divisor."""
    kept = target != divisor.ignore_index
    return ConstantWeights((kept.to(dtype) / K).expand(K, target.shape[0]), None, divisor.inverse(target, dtype))


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
        return uniform_weights(target, K, divisor, dtype)
    if logits is None:
        raise ValueError(f"logits is None, but weighting='confidence' needs {K} tensors (N, C)")
    tensors = checked_logits(logits, target, second)
    if len(tensors) != K:
        raise ValueError(f"logits holds {len(tensors)} tensors, but student_features holds {K}")
    return ConstantWeights(*confidence_and_divisor(tensors, target, second, divisor, backend, way, dtype))


def _given_weights(weighting: Tensor, target: Tensor, K: int, divisor: Divisor, dtype: torch.dtype) -> ConstantWeights:
    N, ignored = target.shape[0], target == divisor.ignore_index
    checks.check_weighting(weighting, K, (N,), "target", target)
    weights = weight_rows(weighting.detach(), K, N, weighting.dtype).masked_fill(ignored, 0.0)
    return ConstantWeights(weights, None, divisor.inverse(target, dtype))
