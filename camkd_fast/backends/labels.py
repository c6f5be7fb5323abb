"""What the labels of a row are, for `reference`: its conventions at the edges that concern them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .contract import SecondLabels


class RowLabels(NamedTuple):
    """The labels of N rows as numbers that can be used as they are: columns in [0, C)."""

    ignored: Tensor  # (N,) bool
    valid: Tensor  # (N,) bool; true for ignored rows
    first: Tensor  # (N,) int64
    second: Tensor | None  # likewise, if rows have a second label
    shares: tuple[Tensor, Tensor] | None  # (N,) each: of the first and of the second label

    def pick(self, log_prob: Tensor) -> Tensor:
        """log_prob (N, C) at the labels, weighted by their shares: (N,). NaN for invalid labels."""
        picked = _at(log_prob, self.first)
        if self.second is not None and self.shares is not None:
            terms = zip(self.shares, (picked, _at(log_prob, self.second)), strict=True)
            mine, other = ((share.to(x.dtype) * x).masked_fill(share == 0, 0.0) for share, x in terms)
            picked = mine + other
        return picked.masked_fill(~self.valid, float("nan"))

    def onehot(self, rows: Tensor) -> Tensor:
        """(N, C) like `rows`, the shares at the labels. Out of place, as torch.func.functionalize needs it."""
        zeros = torch.zeros_like(rows)
        at_first = zeros.scatter(-1, self.first.unsqueeze(-1), 1.0)
        if self.second is None or self.shares is None:
            return at_first
        at_second = zeros.scatter(-1, self.second.unsqueeze(-1), 1.0)
        mine, other = (share.to(rows.dtype).unsqueeze(-1) for share in self.shares)
        return mine * at_first + other * at_second


def _at(rows: Tensor, columns: Tensor) -> Tensor:
    return rows.gather(-1, columns.unsqueeze(-1)).squeeze(-1)


def labels_of(target: Tensor, second: SecondLabels | None, C: int, ignore_index: int | None) -> RowLabels:
    """The conventions at the edges for labels; `ignore_index` is None if no row is to be ignored."""
    ignored = torch.zeros_like(target, dtype=torch.bool) if ignore_index is None else target == ignore_index
    first = target.masked_fill(ignored, 0)
    valid = (first >= 0) & (first < C)
    if second is None:
        return RowLabels(ignored, valid, first.clamp(0, C - 1), None, None)
    # Neither is read where the row is ignored.
    other, mix = second.target.masked_fill(ignored, 0), second.mix.masked_fill(ignored, 1.0)
    valid = valid & (other >= 0) & (other < C) & (mix >= 0) & (mix <= 1)
    if ignore_index is not None:
        valid = valid & (ignored | (other != ignore_index))
    mix = mix.masked_fill(first == other, 1.0)
    return RowLabels(ignored, valid, first.clamp(0, C - 1), other.clamp(0, C - 1), (mix, 1 - mix))
