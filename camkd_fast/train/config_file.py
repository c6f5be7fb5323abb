"""Configs as YAML files, and the differences between two configs."""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..system import expand_path, quote_path
from .atomic import write_atomically
from .config import JOBS, JobConfig
from .source_strings import SourceString
from .yaml_file import read_yaml


def save(config: JobConfig, path: Path) -> None:
    """Write `config` as YAML, with its job ("teach" or "distill") as the first key."""
    import yaml

    job = next(name for name, kind in JOBS.items() if isinstance(config, kind))
    content = {"job": job, **serializable(config, _quoted)}
    write_atomically(path, yaml.safe_dump(content, sort_keys=False).encode())


def _quoted(place: Path | SourceString) -> str:
    return quote_path(place) if isinstance(place, Path) else place.quoted()


def load(path: Path) -> JobConfig:
    """Read a config written by `save` or by hand; missing fields have their defaults, paths are expanded.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not YAML, or a job, field or value is invalid; the message has file and field.
    """
    content = read_yaml(path)
    job = content.get("job") if isinstance(content, dict) else None
    if not isinstance(job, str) or job not in JOBS:
        raise ValueError(f"{path}: job must be one of {', '.join(JOBS)}, got {job!r}")
    kind = JOBS[content.pop("job")]
    try:
        return build(kind, content)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def differences(first: JobConfig, second: JobConfig) -> dict[str, tuple[object, object]]:
    """Map the dotted name of each differing field to its two values."""
    one, two = flat(serializable(first)), flat(serializable(second))
    return {name: (one.get(name), two.get(name)) for name in {**one, **two} if one.get(name) != two.get(name)}


def serializable(value: Any, text: Callable[[Path | SourceString], str] = str) -> Any:
    """Convert dataclasses, paths, sources and tuples to types that YAML can represent.

    Args:
        text: of paths and sources.
    """
    if dataclasses.is_dataclass(value):
        return {f.name: serializable(getattr(value, f.name), text) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [serializable(item, text) for item in value]
    return text(value) if isinstance(value, (Path, SourceString)) else value


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    out: dict[str, Any] = {}
    for name, value in content.items():
        out |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return out


_Config = TypeVar("_Config")


def build(kind: type[_Config], content: Mapping[str, Any], prefix: str = "") -> _Config:
    """An instance of the dataclass `kind` from a mapping; `prefix` is its dotted name in the file.

    Raises:
        ValueError: not a mapping, an unknown field or an invalid value; the message names the field.
        TypeError: a field without a default is missing.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{prefix.rstrip('.')} must be a mapping, got {content!r}")
    hints = get_type_hints(kind)
    for name in content:
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(hints)}"
            raise ValueError(f"unknown field {prefix}{name}; {hint}")
    return kind(**{name: _value(hints[name], value, f"{prefix}{name}") for name, value in content.items()})


def _value(hint: Any, value: Any, name: str) -> Any:
    """Convert a YAML value to the annotated type."""
    origin = get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, f"{name}.")  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (hint,) = (option for option in get_args(hint) if option is not type(None))
        return _value(hint, value, name)
    if origin is tuple and isinstance(value, list):
        return tuple(_value(get_args(hint)[0], item, name) for item in value)
    if hint is Path and isinstance(value, str):
        return expand_path(value)
    if hint is SourceString and isinstance(value, str):
        return SourceString.expanded(value)
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with suppress(ValueError):  # the error below names the field
            return float(value)  # YAML reads 5e-4 as a string
    if origin is Literal and isinstance(value, bool):
        value = "on" if value else "off"  # YAML reads these words as true and false
    if origin is Literal and value in get_args(hint):
        return value
    if isinstance(hint, type) and type(value) is hint:
        return value
    expected = ", ".join(map(repr, get_args(hint))) if origin is Literal else getattr(hint, "__name__", str(hint))
    expected = "a list" if origin is tuple else expected
    raise ValueError(f"{name} must be {expected}, got {value!r}")
