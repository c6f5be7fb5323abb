"""Types of options, which are checked before any work; ranges and choices are the strategies' own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...losses.formula import check_flag, check_int, check_number


def check_like(name: str, value: object, default: object) -> None:
    """
    Raises:
        TypeError: the value has another type than the default.
        ValueError: as `check_number`.
    """
    if isinstance(default, bool):
        check_flag(name, value)
    elif isinstance(default, int):
        check_int(name, value)
    elif isinstance(default, float):
        check_number(name, value, positive=False)
    elif isinstance(default, str) and not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {type(value).__name__} {value!r}")


def check_options(defaults: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Check options against defaults; None asks for a default.

    Raises:
        TypeError, ValueError: as `check_like`.
    """
    for name, value in options.items():
        if value is not None and name in defaults:
            check_like(name, value, defaults[name])
