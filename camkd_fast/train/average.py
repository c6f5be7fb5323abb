"""Exponential moving average of a student."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

# Step t (from 1) has at least the weight 9 / (10 + t), so that the first weights of a run are soon forgotten.
_FIRST, _LATER = 9.0, 10.0


class Average:
    """Average of a module's parameters and buffers over the steps; counters, which are integers, are copied.

    m <- m + w (x - m) with w = max(1 - decay, 9 / (10 + t)) in step t.

    Args:
        module: copied in its present state.

    Attributes:
        module: the average, in evaluation mode.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self._least = 1.0 - decay
        pairs = list(zip(_tensors(self.module), _tensors(module), strict=True))
        self._numbers = _pairs([pair for pair in pairs if pair[0].is_floating_point()])
        self._counters = _pairs([pair for pair in pairs if not pair[0].is_floating_point()])

    @torch.no_grad()
    def update(self, number: float | Tensor, taken: Tensor | None) -> None:
        """Add the state after a step; can be recorded in a CUDA graph.

        Args:
            number: of the step, from 1.
            taken: scalar, 0 if the step was skipped and does not count; None: it counts.
        """
        weight: float | Tensor
        if isinstance(number, Tensor):
            weight = (_FIRST / (number + _LATER)).clamp(min=self._least).float()
        else:
            weight = max(self._least, _FIRST / (number + _LATER))
        _move(*self._numbers, weight if taken is None else weight * taken)
        _move(*self._counters, 1 if taken is None else taken.long())


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _pairs(pairs: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    return [mine for mine, _ in pairs], [theirs.detach() for _, theirs in pairs]


def _move(mine: list[Tensor], theirs: list[Tensor], weight: float | Tensor) -> None:
    if mine:
        difference = torch._foreach_sub(theirs, mine)
        torch._foreach_mul_(difference, weight)
        torch._foreach_add_(mine, difference)
