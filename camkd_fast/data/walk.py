"""The image files of a class folder: those of torchvision's ImageFolder, and a count of what is left out."""

from __future__ import annotations

import functools
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

# Those of torchvision.datasets.ImageFolder, in upper or lower case.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_APPLE_DOUBLE = b"\x00\x05\x16\x07"  # begins the file ._NAME that macOS writes beside NAME on foreign disks
_NAMED = 5  # endings that the warning names


def image_names(folder: Path, left_out: Counter[str]) -> list[str]:
    """Paths of the image files in `folder` at any depth, hidden ones included, folder by folder and sorted by name.

    Args:
        left_out: counts the endings of all other files.

    Raises:
        OSError: a folder cannot be read.
    """
    images = []
    for inside, names in sorted(_walk(str(folder))):
        for name in sorted(names):
            path = os.path.join(inside, name)
            if not name.lower().endswith(EXTENSIONS):
                left_out[_ending(name)] += 1
            elif name.startswith("._") and _is_apple_double(path):
                left_out["._* of macOS"] += 1
            else:
                images.append(path)
    return images


def count_files(root: Path, classes: Sequence[Path], left_out: Counter[str]) -> None:
    """Count the files of `root` that are in no class folder: in the root itself, or in hidden folders.

    Hidden folders need not be readable: they belong to other programs.
    """
    read = {folder.name for folder in classes}
    with os.scandir(root) as entries:
        for entry in entries:
            if not entry.is_dir():
                left_out[_ending(entry.name)] += 1
            elif entry.name not in read:
                count = sum(len(names) for _, names in _walk(entry.path, strict=False))
                left_out.update({"in hidden folders": count} if count else {})


def warn_left_out(root: Path, left_out: Counter[str]) -> None:
    """Warn once about the files that are left out, with their number and endings."""
    if not (total := left_out.total()):
        return
    common = [f"{count} {ending}" for ending, count in sorted(left_out.items(), key=lambda item: (-item[1], item[0]))]
    endings = ", ".join(common[:_NAMED]) + (", ..." if len(common) > _NAMED else "")
    _warn_once(
        f"{root}: {total} file{'s are' if total > 1 else ' is'} left out ({endings}); "
        f"read are files in class folders that end with {' '.join(EXTENSIONS)}"
    )


@functools.cache
def _warn_once(message: str) -> None:
    """The report of a run reads the folders that the run has read."""
    warnings.warn(message, stacklevel=4)


def _walk(folder: str, strict: bool = True) -> Iterator[tuple[str, list[str]]]:
    """Every folder from `folder` downwards with its files. Links are followed, except to a folder that holds them.

    Args:
        strict: whether a folder that cannot be read is an error.
    """

    def fail(error: OSError) -> None:
        if strict:
            raise error

    for inside, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        yield inside, names
        folders[:] = [name for name in folders if not _is_loop(inside, os.path.join(inside, name))]


def _is_loop(inside: str, path: str) -> bool:
    """True for a link to the folder that it is in, or to one above."""
    if not os.path.islink(path):
        return False
    target, here = os.path.realpath(path), os.path.realpath(inside)
    try:
        return os.path.commonpath([target, here]) == target
    except ValueError:  # another drive of Windows
        return False


def _ending(name: str) -> str:
    ending = os.path.splitext(name)[1].lower()
    return ending or "without ending"


def _is_apple_double(path: str) -> bool:
    if not os.path.isfile(path):
        return False
    with suppress(OSError), open(path, "rb") as file:
        return file.read(len(_APPLE_DOUBLE)) == _APPLE_DOUBLE
    return False
