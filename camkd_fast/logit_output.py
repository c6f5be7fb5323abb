"""What the logit loss returns: one loss, and the numbers of the kernel by their names."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import RowLoss


class CAMKDOutput:
    """What the logit loss returns, in the accumulation dtype. Only `loss` is differentiable.

    Everything but the loss is cut out of the kernel's numbers when it is asked for.
    """

    def __init__(self, loss: Tensor, rows: RowLoss, inverse: float | Tensor | None, lead: torch.Size) -> None:
        self.loss = loss  # hard_weight * hard + soft_weight * soft: a scalar, or (...) for reduction="none"
        self._numbers, self._sums, self._means = rows.numbers, rows.sums, rows.means
        self._inverse, self._lead = inverse, lead

    @property
    def hard(self) -> Tensor:
        """Cross-entropy of the student, reduced like `loss`."""
        return reduce_rows(self._rows, 1, self._inverse, self._lead).detach()

    @property
    def soft(self) -> Tensor:
        """T^2 sum_k w_k KL_k, reduced like `loss`."""
        return reduce_rows(self._rows, 2, self._inverse, self._lead).detach()

    @property
    def weights(self) -> Tensor:
        """w_k as (K, ...), 0 on ignored rows."""
        return self._per_teacher(self._rows.weights)

    @property
    def teacher_ce(self) -> Tensor:
        """CE_k at temperature 1 as (K, ...), 0 on ignored rows."""
        return self._per_teacher(self._rows.teacher_ce)

    @property
    def divergence(self) -> Tensor:
        """KL_k at temperature T as (K, ...), 0 on ignored rows."""
        return self._per_teacher(self._rows.divergence)

    @property
    def _rows(self) -> RowLoss:
        return RowLoss(self._numbers, None, self._sums, self._means)

    def _per_teacher(self, numbers: Tensor) -> Tensor:
        return numbers.detach().view(numbers.shape[0], *self._lead)


def reduce_rows(rows: RowLoss, i: int, inverse: float | Tensor | None, lead: torch.Size) -> Tensor:
    """Row i of the numbers (0 loss, 1 hard, 2 soft), summed and times `inverse`, or as (...) where that is None."""
    if rows.means is not None:
        return rows.means[0] if i == 0 else rows.means[1][i - 1]
    if inverse is None:
        return rows.numbers[i].view(lead)
    if rows.sums is not None and isinstance(inverse, float):
        return torch.scalar_tensor(rows.sums[i] * inverse, dtype=rows.numbers.dtype)
    total = rows.numbers[i].sum()
    return total * inverse if isinstance(inverse, float) else total * inverse.squeeze(0)
