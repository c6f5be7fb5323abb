"""The learning rate as a function of the step: a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from typing import NamedTuple

from .config import OptimConfig

# Models with a lower rate in the paper: depthwise convolutions diverge at 0.05.
_SLOW = ("mobilenet", "shuffle")
_ADAPTIVE = 0.001  # AdamW's and Muon's updates have a size that does not depend on the gradient's


def peak_rate(optim: OptimConfig, model: str) -> float:
    """Highest rate of a run: as configured, or SGD's of the paper for this model, or that of adaptive optimisers."""
    if optim.learning_rate is not None:
        return optim.learning_rate
    if optim.optimizer != "sgd":
        return _ADAPTIVE
    return 0.01 if any(family in model.lower() for family in _SLOW) else 0.05


def learning_rate(optim: OptimConfig, peak: float, step: int, steps_per_epoch: int) -> float:
    """Rate of a step, counted from 0 over all epochs; also of the step after the last one."""
    warmup = round(optim.warmup * steps_per_epoch)
    if step < warmup:
        return peak * (step + 1) / warmup
    total = optim.epochs * steps_per_epoch
    if optim.schedule == "cosine":
        decay = max(total - warmup, 1)  # steps; a warmup that is rounded up may take all of them
        return peak * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / decay))
    if optim.schedule == "step":
        drops = (at * (total if at < 1.0 else steps_per_epoch) for at in optim.milestones)
        return peak * float(optim.drop ** sum(step >= drop for drop in drops))
    return peak


class RateChange(NamedTuple):
    """A completed step that two schedules train with different rates."""

    step: int  # counted from 0
    old: float
    new: float


def last_change(
    old: OptimConfig, new: OptimConfig, peak: float, completed: int, steps_per_epoch: int
) -> RateChange | None:
    """The last of the completed steps whose rate differs between two schedules; None if they agree so far."""
    for step in reversed(range(completed)):
        rates = [learning_rate(optim, peak, step, steps_per_epoch) for optim in (old, new)]
        if rates[0] != rates[1]:
            return RateChange(step, *rates)
    return None
