"""Sources of weights among the settings: the strings of `models.sources`, whose paths are expanded as all others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePath

from ..models import hf_models, sources
from ..system import expand_path, quote_path


class SourceString(str):
    """A source of weights, with its path in one spelling; a run folder may be given as a Path."""

    __slots__ = ()

    def __new__(cls, source: str | Path) -> SourceString:
        before, path = sources.split_path(str(source))
        return super().__new__(cls, before + _one_spelling(before, path))

    @classmethod
    def expanded(cls, text: str) -> SourceString:
        """The source with `~` and environment variables of its path replaced, as in `system.expand_path`.

        Raises:
            ValueError: a variable is not set, or a home folder is not known.
        """
        before, path = sources.split_path(text)
        return cls(before + (str(expand_path(path)) if "$" in path or path.startswith("~") else path))

    def path(self) -> Path | None:
        """The file or folder that it names, if there is one; without a layer and options."""
        named = sources.split_path(self)[1]
        without = named.partition("?")[0]
        places = [Path(text) for text in (named, without, without.partition("#")[0]) if text]
        return next((place for place in places if place.exists()), None)

    def quoted(self) -> str:
        """The text from which `expanded` gives this source."""
        before, path = sources.split_path(self)
        special = "$" in path or path.startswith("~")
        return before + (quote_path(Path(path)) if special else path)


def _one_spelling(before: str, path: str) -> str:
    """`runs/t0/` as `runs/t0`, so that equal paths are equal settings. A name of the hub is no path."""
    return path if before == hf_models.PREFIX or not path else str(Path(path))


def labels(teachers: Sequence[str]) -> list[str]:
    """Short names for tables and plots: without the folders of their paths, unless two would be equal."""
    short = []
    for teacher in teachers:
        before, path = sources.split_path(teacher)
        whole = before == hf_models.PREFIX or not PurePath(path).name
        short.append(teacher if whole else before + PurePath(path).name)
    counts = Counter(short)
    return [name if counts[name] == 1 else str(teacher) for name, teacher in zip(short, teachers, strict=True)]
