"""Small wrong changes of the code, and a command that shows which of them the tests notice.

`python -m tests.mutants` (`make mutants`) applies the changes one at a time to a copy of the tree, runs the tests that
are named with each, and prints the changes that no test noticed. The lists are modules of this folder, one per area.
A change that cannot alter any result says why in `equivalent`; it is not run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module

AREAS = (
    *("cpu", "cuda", "triton", "losses", "linear", "shards", "backends"),
    *("step", "training", "strategies", "teachers", "data", "models", "study", "commands", "integrations"),
)


@dataclass(frozen=True)
class Change:
    """One wrong change: `old`, which occurs exactly once in `file`, becomes `new`.

    Attributes:
        name: what goes wrong, in a few words; unique within the area.
        tests: files or node ids, separated by spaces, that must notice it.
        equivalent: why no result can change; empty for a change that a test must notice.
        area: filled in by `load`.
        file: relative to the root; filled in by `changes`.
    """

    name: str
    old: str
    new: str
    tests: str = ""
    equivalent: str = ""
    file: str = ""
    area: str = ""

    @property
    def title(self) -> str:
        return f"{self.area}: {self.name}"


def changes(file: str, tests: str, *listed: Change) -> tuple[Change, ...]:
    """The changes of one file; `tests` are for those that name none."""
    return tuple(replace(change, file=file, tests=change.tests or tests) for change in listed)


def load() -> Iterator[Change]:
    """All changes of all areas."""
    for area in AREAS:
        for change in import_module(f"{__name__}.{area}").CHANGES:
            yield replace(change, area=area)
