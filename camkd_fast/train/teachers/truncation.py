"""Top-k truncation of logits, with one bucket for the other classes, and the resulting error of the loss."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...losses.formula import Formula
from ...losses.logit import camkd_loss_and_grad


class Truncated(NamedTuple):
    """Rows (...) of C logits, of which k are kept."""

    ids: Tensor  # (..., k) class indices, int16, or int32 for more than 32767 classes
    values: Tensor  # (..., k) logits of these classes
    tail: Tensor  # (...) float32, common logit of the C - k other classes


def truncate(logits: Tensor, k: int, temperature: float, dtype: torch.dtype = torch.float32) -> Truncated:
    """Keep the k largest of (..., C) logits.

    The other classes share their total probability mass at `temperature` equally. So at this temperature the k
    probabilities and the mass of the rest are exact, up to the rounding of logits to `dtype`. At a lower temperature,
    as for cross-entropies at 1, the bucket underestimates the mass of the tail.

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
    """Inverse of `truncate`: (..., C) float32 logits."""
    logits = rows.tail.unsqueeze(-1).repeat(*(1,) * rows.tail.dim(), num_classes)
    return logits.scatter_(-1, rows.ids.long(), rows.values.float())


def loss_error(teachers: Tensor, replayed: Tensor, target: Tensor, temperature: float) -> dict[str, dict[str, float]]:
    """Relative error per row of CA-MKD's loss and gradient on replayed logits.

    Args:
        teachers, replayed: (n, K, C), original and replayed logits.
        target: (n,) int64.

    Returns:
        For an untrained student (equal logits) and one half way (half the teachers' mean logits): mean and maximum
        over rows of |loss' - loss| / loss and of |gradient' - gradient| / |gradient|.
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
