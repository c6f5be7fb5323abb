"""Whether methods of other libraries take the arguments that the integrations were written for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

WRITTEN_FOR = {"transformers": "5.24.0", "trl": "1.16.0"}


def check_signature(owner: Any, name: str, expected: Sequence[str], package: str) -> None:
    """
    Args:
        owner: the class or `super()` that has the method.
        expected: names of its parameters, without self.
        package: the one that documents it, of WRITTEN_FOR.

    Raises:
        RuntimeError: it takes other ones; one line that names both and both versions.
    """
    method: Callable[..., Any] | None = getattr(owner, name, None)
    wanted = f"expected ({', '.join(expected)}) as in {package} {WRITTEN_FOR[package]}"
    if method is None:
        raise RuntimeError(f"{package} {_installed(package)} has no {name}: {wanted}")
    found = [parameter for parameter in inspect.signature(method).parameters if parameter != "self"]
    if found != list(expected):
        origin = method.__module__.partition(".")[0]
        raise RuntimeError(
            f"{method.__qualname__} of {origin} {_installed(origin)} takes ({', '.join(found)}): {wanted}"
        )


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "without a version"
