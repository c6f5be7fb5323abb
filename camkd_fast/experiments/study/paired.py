"""Paired differences with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

# Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom: NIST/SEMATECH e-Handbook of Statistical Methods,
# section 1.3.6.7.2.
_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def t95(freedom: int) -> float:
    """Half-width factor of a 95 % interval; above 30 degrees of freedom the slightly too wide value for 30."""
    if freedom < 1:
        raise ValueError(f"an interval needs at least 1 degree of freedom, got {freedom}")
    return _T95[min(freedom, len(_T95)) - 1]


@dataclass(frozen=True)
class Paired:
    """Differences of two methods, one per seed."""

    differences: Sequence[float]

    @property
    def mean(self) -> float:
        return mean(self.differences)

    @property
    def half(self) -> float:
        """Half the width of the mean's 95 % interval; infinite for a single difference."""
        n = len(self.differences)
        return t95(n - 1) * stdev(self.differences) / math.sqrt(n) if n > 1 else math.inf

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    @property
    def outcomes(self) -> tuple[int, int, int]:
        """Wins, ties and losses."""
        wins = sum(difference > 0 for difference in self.differences)
        losses = sum(difference < 0 for difference in self.differences)
        return wins, len(self.differences) - wins - losses, losses
