"""The constants of the logit loss as one object, which travels unchanged from the public functions into every backend.

This is a leaf: it imports nothing of the package, so backends can use it.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

WEIGHTINGS = ("confidence", "uniform", "entropy")


def check_number(name: str, value: float, *, positive: bool) -> None:
    if not isinstance(value, (int, float)) and not isinstance(value, numbers.Real):  # numpy's scalars are Real
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    # Comparisons rather than math.isfinite, which torch.compile cannot trace for a number that changes between calls.
    if not -math.inf < value < math.inf or (positive and value <= 0):
        raise ValueError(f"{name} must be finite{' and > 0' if positive else ''}, got {value}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {value!r}")


def check_ignore_index(ignore_index: int) -> None:
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, (int, numbers.Integral)):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")


class Formula(NamedTuple):
    """loss = hard_weight * CE(student, target) + soft_weight * T^2 * sum_k w_k KL_k, w_k by `weighting`.

    C++ reads the fields by position (csrc/python/arguments.h, read_formula).
    """

    temperature: float = 4.0
    hard_weight: float = 1.0
    soft_weight: float = 1.0
    weighting: str | Tensor = "confidence"  # a name, or weights: (K,) or (K, ...), in a backend (K, N)
    ignore_index: int = -100

    def checked(self) -> Formula:
        """The same constants as Python's floats and int. The shape of a weighting tensor is checked with the logits.

        Raises:
            TypeError, ValueError: naming the constant and its value.
        """
        check_number("temperature", self.temperature, positive=True)
        check_number("hard_weight", self.hard_weight, positive=False)
        check_number("soft_weight", self.soft_weight, positive=False)
        check_ignore_index(self.ignore_index)
        if not isinstance(self.weighting, Tensor):
            check_choice("weighting", self.weighting, WEIGHTINGS)
        return self._replace(
            temperature=float(self.temperature),
            hard_weight=float(self.hard_weight),
            soft_weight=float(self.soft_weight),
            ignore_index=int(self.ignore_index),
        )

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `camkd_loss`."""
        return self._asdict()

    @property
    def weighting_name(self) -> str:
        """The weighting's name; "given" for a tensor."""
        return "given" if isinstance(self.weighting, Tensor) else self.weighting

    @property
    def soft_scale(self) -> float:
        """d loss / d w_k divided by KL_k: soft_weight * T^2."""
        return self.soft_weight * self.temperature**2

    def constants(self) -> tuple[list[float], str, int]:
        """Everything but a weighting tensor, in types that an operator's schema has. See `from_constants`."""
        return list(self[:3]), self.weighting_name, self.ignore_index

    @classmethod
    def from_constants(
        cls, numbers: Sequence[float], weighting: str, ignore_index: int, weights: Tensor | None
    ) -> Formula:
        temperature, hard_weight, soft_weight = numbers
        return cls(temperature, hard_weight, soft_weight, weighting if weights is None else weights, ignore_index)
