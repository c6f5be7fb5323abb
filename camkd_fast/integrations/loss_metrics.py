"""Means of what the linear loss returns, over the tokens of all batches and processes since the last log."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..losses.linear import LinearLossOutput


class LossMetrics:
    """Sums on the device, so that nothing is read from it before a log."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._sums: Tensor | None = None
        self._K = 0

    @torch.no_grad()
    def add(self, out: LinearLossOutput, divisor: float | Tensor | None, weighting: Any = None) -> None:
        """
        Args:
            divisor: that of out.hard and out.soft; None for the number of rows that count.
            weighting: of the loss; a teacher is not computed where a tensor has weight 0.
        """
        K, counted = out.weights.shape[0], out.num_valid.float()
        if divisor is None:
            divisor = counted.clamp(min=1)
        assert out.hard is not None and out.teacher_ce is not None  # trainers always give labels
        entropies = counted.new_full((), torch.nan) if out.entropy is None else out.entropy.sum()
        given = isinstance(weighting, Tensor)
        computed = (out.weights != 0).reshape(K, -1).sum(1) if given else counted.expand(K)
        parts = [
            *(counted, out.hard * divisor, out.soft * divisor, entropies),
            *(out.weights.reshape(K, -1).sum(1), out.teacher_ce.reshape(K, -1).sum(1), computed),
        ]
        sums = torch.cat([torch.as_tensor(part, device=counted.device).float().reshape(-1) for part in parts])
        if self._sums is not None and self._K == K:
            sums += self._sums
        self._sums, self._K = sums, K

    def means(self, accelerator: Any) -> dict[str, float]:
        """Means by name, and forget them. Empty if nothing was added; otherwise every process must call this.

        Cross-entropies of teachers are over the tokens where they were computed; a teacher without any has none. There
        is no entropy unless all losses had one.
        """
        if self._sums is None:
            return {}
        counted, hard, soft, entropy, *rest = accelerator.reduce(self._sums, reduction="sum").tolist()
        K, tokens = self._K, max(counted, 1.0)
        self.clear()
        found = {"hard_loss": hard / tokens, "soft_loss": soft / tokens}
        if not math.isnan(entropy):
            found["entropy"] = entropy / tokens
        for k in range(K):
            found[f"teacher_{k}_weight"] = rest[k] / tokens
            if rest[2 * K + k]:
                found[f"teacher_{k}_ce"] = rest[K + k] / rest[2 * K + k]
        return found
