"""Logits of many classes as the k largest and one bucket for the rest, and what that does to the loss."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...logit_loss import camkd_loss_and_grad
from ..strategies.base import Formula


class Truncated(NamedTuple):
    """Rows (...) of C logits, of which k are kept."""

    ids: Tensor  # (..., k) int16, or int32 beyond 32767 classes
    values: Tensor  # (..., k) their logits
    tail: Tensor  # (...) float32: the logit that each of the C - k other classes is replayed with


def truncate(logits: Tensor, k: int, temperature: float, dtype: torch.dtype = torch.float32) -> Truncated:
    """Keep the k largest of (..., C) logits.

    The mass of all others at `temperature` goes into one bucket, of which they get even shares. So at that temperature
    the k probabilities are exact (but for the rounding of their logits to `dtype`) and so is the mass of the rest.
    At a lower temperature, as for cross-entropies at 1, the bucket is lighter than the true tail: an even spread is.

    Raises:
        ValueError: k is not in [1, C).
    """
    C = logits.shape[-1]
    if not 1 <= k < C:
        raise ValueError(f"top_k must lie in [1, {C}) for {C} classes, got {k}")
    logits = logits.float()
    values, ids = logits.topk(k)
    rest = logits.scatter(-1, ids, float("-inf"))
    tail = temperature * ((rest / temperature).logsumexp(-1) - math.log(C - k))
    return Truncated(ids.to(torch.int16 if C <= 32767 else torch.int32), values.to(dtype), tail)


def expand(rows: Truncated, num_classes: int) -> Tensor:
    """(..., C) float32 logits again."""
    logits = rows.tail.unsqueeze(-1).repeat(*(1,) * rows.tail.dim(), num_classes)
    return logits.scatter_(-1, rows.ids.long(), rows.values.float())


def loss_error(teachers: Tensor, replayed: Tensor, target: Tensor, temperature: float) -> dict[str, dict[str, float]]:
    """How far loss and gradient of CA-MKD on replayed logits are from those on the teachers' own, row by row.

    Args:
        teachers, replayed: (n, K, C).
        target: (n,) int64.

    Returns:
        For a student that knows nothing (equal logits) and one half way (half the teachers' mean logits): mean and
        maximum over rows of |loss' - loss| / loss and of |gradient' - gradient| / |gradient|.
    """
    result = {}
    students = {"untrained": torch.zeros_like(teachers[:, 0]).float(), "half way": teachers.float().mean(1) / 2}
    for name, student in students.items():
        (true, gradient), (ours, other) = (
            camkd_loss_and_grad(
                student, list(logits.float().unbind(1)), target, reduction="none", **Formula(temperature).options()
            )
            for logits in (teachers, replayed)
        )
        tiny = torch.finfo(torch.float32).tiny
        loss = (ours.loss - true.loss).abs() / true.loss.clamp(min=tiny)
        slope = (other - gradient).norm(dim=1) / gradient.norm(dim=1).clamp(min=tiny)
        result[name] = {
            "loss mean": loss.mean().item(),
            "loss max": loss.max().item(),
            "gradient mean": slope.mean().item(),
            "gradient max": slope.max().item(),
        }
    return result
