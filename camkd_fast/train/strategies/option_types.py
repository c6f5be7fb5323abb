"""Types of options, which are checked before any work; ranges and choices are the strategies' own."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

from ...losses.formula import check_number


def check_real(name: str, value: Any, positive: bool = False) -> None:
    """
    Raises:
        TypeError: the value is no number; True and False are none.
        ValueError: it is infinite or NaN, or not above 0 if it must be `positive`.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    check_number(name, value, positive=positive)  # type: ignore[arg-type]


def check_flag(name: str, value: object) -> None:
    """
    Raises:
        TypeError: the value is neither True nor False.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_like(name: str, value: object, default: object) -> None:
    """
    Raises:
        TypeError: the value has another type than the default.
        ValueError: as `check_real`.
    """
    if isinstance(default, bool):
        check_flag(name, value)
    elif isinstance(default, int):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} must be an int, got {value!r}")
    elif isinstance(default, float):
        check_real(name, value)
    elif isinstance(default, str) and not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {value!r}")


def check_options(defaults: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Check options against defaults; None asks for a default.

    Raises:
        TypeError, ValueError: as `check_like`.
    """
    for name, value in options.items():
        if value is not None and name in defaults:
            check_like(name, value, defaults[name])
