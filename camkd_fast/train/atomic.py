"""Atomic file writes: a killed process or a full disk leaves no partial file."""

from __future__ import annotations

import os
from pathlib import Path

from ..system import replace, sync_folder


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the content of `path` by `data`, or leave it unchanged.

    Raises:
        OSError: the folder is not writable or the disk is full; the temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_synced(temporary, data)
        replace(temporary, path)
    except BaseException:  # a signal too
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and fsync it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
