"""The check of all image files before training: by their headers, with the damaged ones named."""

from __future__ import annotations

import logging
from typing import NamedTuple

from .batch import BadImageError
from .files import ImageFiles
from .splits import Splits

log = logging.getLogger(__name__)
_NAMED = 2  # further files that an error names


class Unreadable(NamedTuple):
    """Positions of the unreadable files in each split, for `LoaderConfig.known_bad`."""

    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]


def read_all_headers(splits: Splits) -> None:
    """Read the headers of all files and cache them, for other processes too."""
    for part in splits:
        if isinstance(part, ImageFiles):
            part.headers()


def find_unreadable(splits: Splits, skip_bad: int, quiet: bool = False) -> Unreadable:
    """Find the files that cannot be images by their headers. Arrays have none.

    Args:
        skip_bad: files that may be unreadable, in all splits together.
        quiet: do not log the files that will be skipped.

    Raises:
        BadImageError: more files are unreadable. The message names the first ones, their number and the way out.
    """
    problems: list[tuple[str, str]] = []  # path, reason
    total = 0
    positions = []
    for part in splits:
        found = part.headers().problems if isinstance(part, ImageFiles) else {}
        positions.append(tuple(found))
        if isinstance(part, ImageFiles):
            problems += [(str(part.paths[sample]), reason) for sample, reason in found.items()]
            total += len(part)
    count = len(problems)
    if count > skip_bad:
        path, reason = problems[0]
        also = ", ".join(path for path, _ in problems[1 : 1 + _NAMED])
        raise BadImageError(
            f"{path} cannot be read as an image: {reason}{'; nor can ' * bool(also)}{also} ({count} unreadable of "
            f"{total} files, at most skip_bad={skip_bad} are skipped): replace or remove "
            f"{'them' if count > 1 else 'it'}, or set skip_bad to {count}"
        )
    if not quiet:
        for number, (path, reason) in enumerate(problems, 1):
            log.warning(
                "skipped: %s cannot be read as an image: %s (%d of skip_bad=%d)", path, reason, number, skip_bad
            )
    return Unreadable(*positions)
