"""The learning rate as a function of the step: a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from .config import OptimConfig

# Models with a lower rate in the paper: depthwise convolutions diverge at 0.05.
_SLOW = ("mobilenet", "shufflenet")


def peak_rate(optim: OptimConfig, model: str) -> float:
    """Highest rate of a run: as configured, or the paper's for this model."""
    if optim.learning_rate is not None:
        return optim.learning_rate
    return 0.01 if any(family in model.lower() for family in _SLOW) else 0.05


def learning_rate(optim: OptimConfig, peak: float, step: int, steps_per_epoch: int) -> float:
    """Rate of a step, counted from 0 over all epochs."""
    warmup = round(optim.warmup * steps_per_epoch)
    if step < warmup:
        return peak * (step + 1) / warmup
    total = optim.epochs * steps_per_epoch
    if optim.schedule == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (total - warmup)))
    if optim.schedule == "step":
        return peak * float(optim.drop ** sum(step >= share * total for share in optim.milestones))
    return peak
