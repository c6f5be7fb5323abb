"""What the logit loss returns: the loss, and the kernel's numbers by name."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.contract import HARD, LOSS, SOFT, RowLossResult


@dataclass(eq=False, repr=False)
class CAMKDOutput:
    """The result of the logit loss, in the accumulation dtype. Only `loss` is differentiable.

    Everything but the loss is computed from the kernel's numbers when it is read. Results have memory of their own, so
    they may be changed in place. DDP finds the loss in a dataclass, FSDP2 in a pytree: a module may return the result.
    """

    loss: Tensor  # hard_weight * hard + soft_weight * soft (+ z-loss): a scalar, or (...) for reduction="none"
    _row_stats: Tensor
    _sums: tuple[float, float, float] | None
    _means: tuple[Tensor, Tensor] | None
    _inverse_divisor: float | Tensor | None
    _lead: torch.Size

    @property
    def hard(self) -> Tensor:
        """Cross-entropy of the student, reduced like `loss`."""
        return self._reduced(HARD)

    @property
    def soft(self) -> Tensor:
        """T^2 sum_k w_k D_k, reduced like `loss`; without T^2 if not `scale_by_t2`."""
        return self._reduced(SOFT)

    @property
    def weights(self) -> Tensor:
        """w_k as (K, ...), 0 on ignored rows."""
        return self._per_teacher(self._result.weights)

    @property
    def teacher_ce(self) -> Tensor:
        """CE_k at temperature 1 as (K, ...), 0 on ignored rows."""
        return self._per_teacher(self._result.teacher_ce)

    @property
    def divergence(self) -> Tensor:
        """D_k at temperature T as (K, ...), 0 on ignored rows: KL_k, or the divergence requested."""
        return self._per_teacher(self._result.divergence)

    @property
    def entropy(self) -> Tensor | None:
        """-sum_c q_c log q_c of the student at temperature T as (...), 0 on ignored rows; None unless requested."""
        rows = self._result.entropy
        return None if rows is None else rows.detach().view(self._lead).clone()

    @property
    def _result(self) -> RowLossResult:
        return RowLossResult(self._row_stats, None)

    def _reduced(self, row: int) -> Tensor:
        return reduce_rows(self._row_stats, row, self._sums, self._means, self._inverse_divisor, self._lead).detach()

    def _per_teacher(self, rows: Tensor) -> Tensor:
        return rows.detach().view(rows.shape[0], *self._lead).clone()


torch.export.register_dataclass(CAMKDOutput, serialized_type_name="camkd_fast.CAMKDOutput")


def reduce_rows(
    row_stats: Tensor,
    row: int,
    sums: tuple[float, float, float] | None,
    means: tuple[Tensor, Tensor] | None,
    inverse_divisor: float | Tensor | None,
    lead: torch.Size,
) -> Tensor:
    """LOSS, HARD or SOFT of `row_stats`: summed and times `inverse_divisor`, or as (...) if that is None.

    Uses the backend's `sums` or `means` if there are any.
    """
    if means is not None:
        return means[0] if row == LOSS else means[1][row - 1].clone()
    if inverse_divisor is None:
        return row_stats[row].view(lead).clone()
    if sums is not None and isinstance(inverse_divisor, float):
        # By way of float64: a sum beyond the range of float32 becomes inf rather than an error.
        return torch.scalar_tensor(sums[row] * inverse_divisor, dtype=torch.float64, device="cpu").to(row_stats.dtype)
    total = row_stats[row].sum()
    return total * inverse_divisor if isinstance(inverse_divisor, float) else total * inverse_divisor.squeeze(0)
