"""Labels of logits (..., C): one per row, or two with their shares (Mixup, CutMix); cross-entropy and smoothing."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses import checks
from ..losses.formula import Formula
from ..losses.layout import contiguous_labels, second_labels, second_rows
from ..losses.scale_plan import divisor_of


class Labels(NamedTuple):
    """Labels of N rows; cross-entropies are mix CE(target) + (1 - mix) CE(second_target)."""

    target: Tensor  # (...) int64; `ignore_index` for rows that do not count
    second_target: Tensor | None = None  # (...) int64; None: rows have one label
    mix: Tensor | None = None  # (...) float32 in [0, 1], the share of `target`
    ignore_index: int = Formula().ignore_index

    def kept(self) -> Tensor:
        """(...) bool: the rows that count."""
        return self.target != self.ignore_index

    def second(self) -> dict[str, Tensor]:
        """The second labels as keywords of a loss; empty for rows of one label."""
        if self.second_target is None or self.mix is None:
            return {}
        return {"second_target": self.second_target, "mix": self.mix}

    def largest(self) -> Tensor:
        """(...) the label with the larger share."""
        if self.second_target is None or self.mix is None:
            return self.target
        return torch.where(self.mix >= 0.5, self.target, self.second_target)

    def cross_entropy(self, logits: Tensor, smoothing: float, num_items: float | Tensor | None) -> Tensor:
        """Scalar, differentiable: the sum over rows divided by `num_items`, or by the rows that count if it is None."""
        logits, first = logits.reshape(-1, logits.shape[-1]), self.target.reshape(-1)
        if self.second_target is None or self.mix is None:
            total = F.cross_entropy(
                logits, first, reduction="sum", label_smoothing=smoothing, ignore_index=self.ignore_index
            )
            return total / self._divisor(num_items)
        kept, mix = self.kept().reshape(-1), self.mix.reshape(-1).to(logits.dtype)
        total = logits.new_zeros(())
        for target, share in ((first, mix), (self.second_target.reshape(-1), 1 - mix)):
            read = torch.where(kept & (share != 0), target, self.ignore_index)  # others may be any
            each = F.cross_entropy(
                logits, read, reduction="none", label_smoothing=smoothing, ignore_index=self.ignore_index
            )
            total = total + torch.where(kept & (share != 0), share * each, 0.0).sum()
        return total / self._divisor(num_items)

    def smoothing_slope(self, logits: Tensor) -> Tensor:
        """d/d logits (..., C) of what label smoothing adds to the summed cross-entropy, per unit of smoothing.

        The smoothed cross-entropy of a row is CE + eps (z_y - mean_c z_c), with both labels by their shares in z_y: the
        second part is linear in the logits.
        """
        C = logits.shape[-1]
        classes = torch.arange(C, device=logits.device)
        onehot = (classes == self.target.unsqueeze(-1)).to(logits.dtype)
        if self.second_target is not None and self.mix is not None:
            mix = self.mix.to(logits.dtype).unsqueeze(-1)
            onehot = mix * onehot + (1 - mix) * (classes == self.second_target.unsqueeze(-1)).to(logits.dtype)
        return torch.where(self.kept().unsqueeze(-1), onehot - 1 / C, 0.0)

    def smoothed(self, logits: Tensor, num_items: float | Tensor | None) -> Tensor:
        """Scalar, differentiable: the sum that `smoothing_slope` describes, divided as in `cross_entropy`."""
        slope = self.smoothing_slope(logits)
        total = torch.where(slope != 0, slope * logits, 0.0).sum()
        return total / self._divisor(num_items)

    def _divisor(self, num_items: float | Tensor | None) -> float | Tensor:
        """`num_items`, or how many rows count; 1 if none does, as in the losses."""
        if num_items is None:
            return self.kept().sum().clamp(min=1)
        if not isinstance(num_items, Tensor):
            return num_items
        return divisor_of(num_items.reshape(()), self.kept().any())

    def check(self, logits: Tensor, num_items: float | Tensor | None) -> None:
        """
        Raises:
            ValueError, TypeError: as `camkd_loss`.
        """
        second = second_labels(self.second_target, self.mix)
        checks.check_target(self.target, second, logits, "the student's logits")
        checks.check_num_items(num_items, "mean")
        if checks.can_count(self.target):
            labels = contiguous_labels(self.target)
            checks.count_labels(labels, logits.shape[-1], self.ignore_index, second_rows(second, torch.float32))
