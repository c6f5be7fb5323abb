"""`--class-map`: a file that says which class of a teacher is which class of the student's images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from ..system import utf8_text
from .class_names import normal, positions
from .source_strings import SourceString
from .yaml_file import read_yaml, unique

_LISTED = 3  # classes in an error


@dataclass(frozen=True)
class Classes:
    """The classes of a model or of a data set.

    Attributes:
        whose: for errors, such as "the images".
        names: in the order of the labels; None: unknown.
    """

    whose: str
    count: int
    names: Sequence[str] | None

    def position(self, given: object, file: Path) -> int:
        """Position of a class that a file names, or counts from 0. A name that is a number is a name.

        Raises:
            ValueError: there is no such class, or there are several.
        """
        if isinstance(given, bool) or not isinstance(given, (str, int)):
            raise ValueError(f"{file}: class {given!r} of {self.whose} must be a name or a number; put names in quotes")
        found = self._places.get(normal(str(given)), [])
        if len(found) > 1:
            raise ValueError(f"{file}: {len(found)} classes of {self.whose} are called {given!r}: give its number")
        if found:
            return found[0]
        number = given if isinstance(given, int) else int(given) if given.isdecimal() else -1
        if 0 <= number < self.count:
            return number
        if isinstance(given, int) or given.isdecimal():
            raise ValueError(f"{file}: class {given} of {self.whose} must lie in [0, {self.count})")
        near = get_close_matches(given, self.names or (), n=_LISTED)
        known = f"nearest: {', '.join(near)}" if near else f"there are {self.count}"
        raise ValueError(f"{file}: no class of {self.whose} is called {given!r}; {known}")

    @cached_property
    def _places(self) -> dict[str, list[int]]:
        return positions(self.names or ())

    def named(self, position: int) -> str:
        return repr(self.names[position]) if self.names else str(position)


@dataclass(frozen=True)
class ClassMap:
    """Classes of the student's images -> classes of a teacher, each by name or number; constructed by `read`.

    Attributes:
        by_teacher: a mapping for each teacher that has one.
    """

    file: Path
    by_teacher: Mapping[str, Mapping[object, object]]

    @classmethod
    def read(cls, file: Path, teachers: Sequence[str]) -> ClassMap:
        """Read a JSON or YAML file: one mapping for all teachers, or a mapping of teachers to such mappings.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is neither, it is no mapping, or it names a teacher that is not among `teachers`.
        """
        content = _parse(file)
        if not isinstance(content, dict) or not content:
            raise ValueError(f"{file} must map classes of the images to classes of a teacher, got {content!r}")
        nested = [name for name, value in content.items() if isinstance(value, dict)]
        if not nested:
            return cls(file, {str(teacher): content for teacher in teachers})
        if len(nested) < len(content):
            other = next(name for name in content if name not in nested)
            raise ValueError(
                f"{file} has a mapping for {nested[0]!r}, but not for {other!r}: "
                "give one mapping for all teachers, or one for each"
            )
        given = {str(SourceString.expanded(str(name))): mapping for name, mapping in content.items()}
        if unknown := [name for name in given if name not in teachers]:
            raise ValueError(f"{file} names {unknown[0]!r}, but the teachers are {', '.join(map(str, teachers))}")
        return cls(file, given)

    def order(self, teacher: str, theirs: Classes, ours: Classes) -> list[int] | None:
        """Position of each of our classes among the teacher's; None if the file has nothing for this teacher.

        Raises:
            ValueError: a class does not exist, one of ours is missing or there twice, or two of ours are one of theirs.
                The message has the file and the class.
        """
        if teacher not in self.by_teacher:
            return None
        order: dict[int, int] = {}
        for mine, meant in self.by_teacher[teacher].items():
            position = ours.position(mine, self.file)
            if position in order:
                raise ValueError(f"{self.file}: class {ours.named(position)} of {ours.whose} is there twice")
            order[position] = theirs.position(meant, self.file)
        missing = [ours.named(position) for position in range(ours.count) if position not in order]
        if missing:
            more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
            raise ValueError(f"{self.file} lacks class {', '.join(missing[:_LISTED])}{more} of {ours.whose}")
        first: dict[int, int] = {}
        for position, place in sorted(order.items()):
            if (other := first.setdefault(place, position)) != position:
                both = f"{ours.named(other)} and {ours.named(position)} of {ours.whose}"
                raise ValueError(f"{self.file}: {both} are both class {theirs.named(place)} of {theirs.whose}")
        return [order[position] for position in range(ours.count)]


def _parse(file: Path) -> Any:
    """Content of a JSON or YAML file without a key that is there twice, which the parsers accept in silence."""
    if file.suffix.lower() != ".json":
        return read_yaml(file)
    try:
        return json.loads(utf8_text(file), object_pairs_hook=unique)
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
