"""The confidence-weighted logit loss as a PyTorch user would write it: the baseline of the measurements.

The formulas of `backends.reference`, without its handling of infinite logits and ignored rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def eager_loss(
    student: Tensor,
    teachers: Sequence[Tensor],
    target: Tensor,
    temperature: float = 4.0,
    hard_weight: float = 1.0,
    soft_weight: float = 1.0,
) -> Tensor:
    """hard_weight * CE + soft_weight * T^2 * mean_n sum_k w_k KL_k, differentiable through autograd.

    Args:
        student: (N, C).
        teachers: K >= 2 tensors (N, C) without gradient.
        target: (N,) int64 in [0, C).
    """
    with torch.no_grad():
        teacher_ce = torch.stack([F.cross_entropy(z, target, reduction="none") for z in teachers])
        weights = (1.0 - teacher_ce.softmax(0)) / (len(teachers) - 1)
    log_q = F.log_softmax(student / temperature, dim=-1)
    soft = student.new_zeros(target.shape)
    for weight, z in zip(weights, teachers, strict=True):
        log_p = F.log_softmax(z / temperature, dim=-1)
        soft = soft + weight * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return hard_weight * F.cross_entropy(student, target) + soft_weight * temperature**2 * soft.mean()
