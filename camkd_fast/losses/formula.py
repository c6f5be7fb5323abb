"""The constants of the logit loss as one object, which travels unchanged from the public functions into every backend.

A leaf but for `divergence`: it imports nothing else of the package, so backends can use it.
"""

from __future__ import annotations

import numbers
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .divergence import FORWARD_KL, Divergence, as_divergence

WEIGHTINGS = ("confidence", "uniform", "entropy", "min_ce")


def check_number(name: str, value: object, *, positive: bool) -> None:
    """
    Raises:
        TypeError: the value is no number; True and False are none.
        ValueError: it is infinite or NaN, or not above 0 if it must be `positive`.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):  # numpy's scalars are Real
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    if not isinstance(value, (int, float)):
        value = float(value)  # NumPy's narrow floats would overflow in the comparison
    # Comparisons rather than math.isfinite, which torch.compile cannot trace for a number that changes between calls.
    if not -sys.float_info.max <= value <= sys.float_info.max or (positive and value <= 0):
        raise ValueError(f"{name} must be finite{' and > 0' if positive else ''}, got {value}")


def check_int(name: str, value: object, least: int | None = None) -> None:
    """
    Raises:
        TypeError: the value is no integer; True and False are none.
        ValueError: it is less than `least`.
    """
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")
    if least is not None and int(value) < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {value!r}")


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__} {value!r}")


def check_ignore_index(ignore_index: int) -> None:
    check_int("ignore_index", ignore_index)
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must be an int64, got {ignore_index}")


class LogitMap(NamedTuple):
    """From what a head computes, x, to a logit: cap * tanh(scale * x / cap), or scale * x without a cap (0)."""

    scale: float = 1.0
    softcap: float = 0.0


class Formula(NamedTuple):
    """loss = hard_weight * CE(student, target) + soft_weight * T^2 * sum_k w_k D_k + z_loss_weight * lse(student)^2.

    w_k by `weighting`, D_k by `divergence`, T^2 only if `scale_by_t2`. Fields are keywords of `camkd_loss`; C++ reads
    them by position (csrc/python/arguments.h, read_formula).
    """

    temperature: float = 4.0
    hard_weight: float = 1.0
    soft_weight: float = 1.0
    weighting: str | Tensor = "confidence"  # a name, or weights: (K,) or (K, ...), in a backend (K, N)
    ignore_index: int = -100
    divergence: str | tuple[str, float] = "forward_kl"  # in a backend a Divergence
    scale_by_t2: bool = True
    z_loss_weight: float = 0.0
    student_logit_scale: float = 1.0
    student_softcap: float | None = None
    teacher_logit_scales: Sequence[float] | None = None  # one per teacher
    teacher_softcaps: Sequence[float | None] | None = None
    entropy: bool = False  # row_stats end with the student's entropies

    def checked(self, K: int | None = None) -> Formula:
        """The same constants as Python's floats and int. The shape of a weighting tensor is checked with the logits.

        Args:
            K: number of teachers, if it is known.

        Raises:
            TypeError, ValueError: naming the constant and its value.
        """
        check_number("temperature", self.temperature, positive=True)
        check_number("hard_weight", self.hard_weight, positive=False)
        check_number("soft_weight", self.soft_weight, positive=False)
        check_ignore_index(self.ignore_index)
        if not isinstance(self.weighting, Tensor):
            check_choice("weighting", self.weighting, WEIGHTINGS)
        basic = self.replaced(
            temperature=float(self.temperature),
            hard_weight=float(self.hard_weight),
            soft_weight=float(self.soft_weight),
            ignore_index=int(self.ignore_index),
        )
        rest = tuple(self)[5:]
        if tuple(map(type, rest)) == _BASIC_TYPES and rest == _BASIC:
            return basic
        return basic.replaced(**self._checked_extensions(K))

    def replaced(self, **changes: Any) -> Formula:
        """`_replace`, which torch.compile cannot trace before torch 2.11."""
        if not torch.compiler.is_compiling():
            return self._replace(**changes)
        return Formula(**{**self.options(), **changes})

    def is_basic(self) -> bool:
        """Whether it is the paper's formula: nothing of what follows `ignore_index`, and not "min_ce"."""
        return self._has_basic_rest() and self.weighting_name() != "min_ce"

    def _has_basic_rest(self) -> bool:
        return tuple(self)[5:] == _BASIC

    def _checked_extensions(self, K: int | None) -> dict[str, Any]:
        check_flag("scale_by_t2", self.scale_by_t2)
        check_flag("entropy", self.entropy)
        check_number("z_loss_weight", self.z_loss_weight, positive=False)
        check_number("student_logit_scale", self.student_logit_scale, positive=True)
        if self.student_softcap is not None:
            check_number("student_softcap", self.student_softcap, positive=True)
        return {
            "divergence": _in_one_form(self.divergence),
            "scale_by_t2": self.scale_by_t2 or self.temperature == 1,  # the same, and kernels may be specialised to it
            "z_loss_weight": float(self.z_loss_weight),
            "student_logit_scale": float(self.student_logit_scale),
            "student_softcap": None if self.student_softcap is None else float(self.student_softcap),
            "teacher_logit_scales": _numbers_of_teachers("teacher_logit_scales", self.teacher_logit_scales, K),
            "teacher_softcaps": _numbers_of_teachers("teacher_softcaps", self.teacher_softcaps, K, optional=True),
        }

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `camkd_loss`."""
        return dict(zip(Formula._fields, tuple(self), strict=True))

    def weighting_name(self) -> str:
        """The weighting's name; "given" for a tensor."""
        return "given" if isinstance(self.weighting, Tensor) else self.weighting

    def given_weights(self) -> Tensor | None:
        """The weights, if they are a tensor."""
        return self.weighting if isinstance(self.weighting, Tensor) else None

    def divergence_kind(self) -> Divergence:
        """The divergence as backends take it."""
        return as_divergence(self.divergence)

    def student_map(self) -> LogitMap:
        """From the student's tensor to its logits."""
        return LogitMap(self.student_logit_scale, self.student_softcap or 0.0)

    def teacher_map(self, k: int) -> LogitMap:
        """From the tensor of teacher k to its logits."""
        scale = 1.0 if self.teacher_logit_scales is None else self.teacher_logit_scales[k]
        return LogitMap(scale, (None if self.teacher_softcaps is None else self.teacher_softcaps[k]) or 0.0)

    def soft_scale(self) -> float:
        """d loss / d w_k divided by D_k: soft_weight * T^2, or soft_weight."""
        return self.soft_weight * (self.temperature**2 if self.scale_by_t2 else 1.0)

    def soft_grad_scale(self) -> float:
        """soft_scale / T, which multiplies gradients by s / T."""
        return self.soft_weight * self.temperature if self.scale_by_t2 else self.soft_weight / self.temperature

    def constants(self) -> tuple[list[float], str, str, int]:
        """Everything but a weighting tensor, in types that an operator's schema has. See `from_constants`."""
        kind, parameter = self.divergence_kind()
        # Not float(flag): in a trace whose numbers change, a flag that was computed from one is no bool
        flags = [1.0 if self.scale_by_t2 else 0.0, 1.0 if self.entropy else 0.0]
        student = [float(x) for x in self.student_map()]
        scales, softcaps = self.teacher_logit_scales, self.teacher_softcaps
        K = len(scales or softcaps or ())
        teachers = [float(x) for k in range(K) for x in self.teacher_map(k)]
        weights = [self.hard_weight, self.soft_weight, parameter, self.z_loss_weight]
        values = [self.temperature, *weights, *flags, *student, *teachers]
        return values, self.weighting_name(), kind, self.ignore_index

    @classmethod
    def from_constants(
        cls, values: Sequence[float], weighting: str, divergence: str, ignore_index: int, weights: Tensor | None
    ) -> Formula:
        T, hard_weight, soft_weight, parameter, z_loss_weight, by_t2, entropy, scale, softcap, *teachers = values
        return cls(
            *(T, hard_weight, soft_weight, weighting if weights is None else weights, ignore_index),
            *(_in_one_form(Divergence(divergence, parameter)), bool(by_t2), z_loss_weight),
            *(scale, softcap or None),
            *(tuple(teachers[::2]) or None, tuple(x or None for x in teachers[1::2]) or None),
            bool(entropy),
        )


_BASIC = Formula()[5:]
_BASIC_TYPES = tuple(map(type, _BASIC))  # numbers of NumPy are equal to Python's, and are converted


def _in_one_form(divergence: str | tuple[str, float]) -> str | Divergence:
    """The divergence as backends take it; of the paper's only the name, so that formulas can be compared."""
    found = as_divergence(divergence)
    return found.kind if found == FORWARD_KL else found


def _numbers_of_teachers(name: str, values: Any, K: int | None, optional: bool = False) -> tuple[Any, ...] | None:
    """One positive number per teacher, or if they are `optional` None for some; None if nothing is given."""
    if values is None:
        return None
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{name} must be a sequence with a number per teacher, got {type(values).__name__}")
    if K is not None and len(values) != K:
        raise ValueError(f"{name} holds {len(values)} numbers, but there are {K} teachers")
    for k, value in enumerate(values):
        if value is not None or not optional:
            check_number(f"{name}[{k}]", value, positive=True)
    return tuple(None if value is None else float(value) for value in values)
