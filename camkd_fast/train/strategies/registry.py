"""Strategies by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from ...losses.formula import Formula, check_number
from ..teachers.live import Teachers
from .base import Setup, Strategy
from .option_types import check_options

STRATEGIES: dict[str, type[Strategy]] = {}  # in the order of registration
COMMON = {"alpha": 1.0, "temperature": 4.0, "official_scale": False}  # options of all strategies, with their defaults
UNSET = {"beta": None, "uniform": "none"}  # values of options that ask for nothing, see `create`

_Kind = TypeVar("_Kind", bound=type[Strategy])


def register(kind: _Kind) -> _Kind:
    """Class decorator: make a strategy available by its name.

    Raises:
        TypeError: `name`, `label` or `color` is missing.
        ValueError: another class has that name.
    """
    missing = [attribute for attribute in ("name", "label", "color") if not hasattr(kind, attribute)]
    if missing:
        raise TypeError(f"strategy {kind.__name__} lacks {', '.join(missing)}")
    if STRATEGIES.setdefault(kind.name, kind) is not kind:
        raise ValueError(f"{kind.__name__} and {STRATEGIES[kind.name].__name__} are both named {kind.name!r}")
    return kind


def unregister(name: str) -> None:
    """Remove a registered strategy.

    Raises:
        ValueError: as `find`.
    """
    del STRATEGIES[find(name).name]


def names() -> tuple[str, ...]:
    """Names of all registered strategies, in order."""
    return tuple(STRATEGIES)


def taking(option: str) -> tuple[str, ...]:
    """Names of the strategies that take an option, in order."""
    return tuple(name for name, kind in STRATEGIES.items() if option in kind.options)


def find(name: str) -> type[Strategy]:
    """The class of that name.

    Raises:
        ValueError: no strategy has that name; the nearest names are given.
    """
    if name not in STRATEGIES:
        near = difflib.get_close_matches(name, STRATEGIES, n=3, cutoff=0.4) or STRATEGIES
        raise ValueError(f"no strategy is named {name!r}; nearest: {', '.join(near)}")
    return STRATEGIES[name]


def check(name: str, options: Mapping[str, Any]) -> type[Strategy]:
    """The class of that name, after a check of all options that `create` would get; teachers are not needed.

    Raises:
        ValueError: an unknown name, an option that the strategy lacks, a number that is not finite, or T <= 0.
        TypeError: no strategy has that option, or its value has another type.
    """
    kind = find(name)
    check_options(COMMON, options)
    if options.get("temperature") is not None:
        check_number("temperature", options["temperature"], positive=True)
    for option, value in options.items():
        if option in COMMON:
            continue
        if not taking(option):
            raise TypeError(f"no strategy has an option {option!r}")
        for who in taking(option):
            check_options(STRATEGIES[who].options, {option: value})
        if option in UNSET and value != UNSET[option] and option not in kind.options:
            who = ", ".join(taking(option))
            raise ValueError(f"{option} is {value!r}, but {name} has no option {option}: it is for {who}")
    return kind


def create(name: str, teachers: Teachers | None, student_features: int, **options: Any) -> Strategy:
    """An instance of the named strategy; its parameters are initialised from torch's global generator.

    Args:
        name: one of `names()`.
        teachers: the K teachers; None for strategies without teachers.
        student_features: channels of the student's last feature map.
        options: alpha (1), strength of the soft loss before the division (table of the package); temperature (4);
            official_scale (False), divide as the official code does; and values that replace the class's `options`.
            None keeps a default, as does `uniform="none"`; `beta` and `uniform` are refused by strategies without
            them. Other options are ignored by these.

    Raises:
        ValueError, TypeError: as `check`; no teachers, or what `Strategy.build` raises.
    """
    kind = check(name, options)
    if kind.needs_teachers and teachers is None:
        raise ValueError(f"{name} learns from teachers, but none were given")
    common: dict[str, Any] = {
        key: options.get(key) if options.get(key) is not None else default for key, default in COMMON.items()
    }
    divisor = 1 if teachers is None else kind.divisor(len(teachers.num_features), common["official_scale"])
    soft_weight = common["alpha"] / divisor if kind.needs_teachers else 0.0
    formula = Formula(common["temperature"], soft_weight=soft_weight, weighting=kind.rule)
    given = {name: options[name] for name in kind.options if options.get(name) is not None}
    return kind.build(Setup(formula, teachers, student_features, divisor, {**kind.options, **given}))


def refuse_logits_only(name: str, reason: str, strategy: type[Strategy]) -> None:
    """Check that a strategy serves a model without a feature map.

    Raises:
        ValueError: it does not; the message has the reason why the model has none, and the strategies that do.
    """
    if strategy.needs_features:
        others = [other for other, kind in STRATEGIES.items() if kind.needs_teachers and not kind.needs_features]
        raise ValueError(
            f"{strategy.name} needs feature maps, but {name} has none: {reason}; strategies without feature maps: "
            f"{', '.join(others)}"
        )
