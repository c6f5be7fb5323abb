"""Which teachers a run learned from: `teachers.json` in its folder, a source and a hash each, see `teacher_hash`.

The file is written with the config, before the first step, and again by a run that starts anew. A run of an earlier
version has none: it goes on with the teachers that it finds, and has the file from then on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from .atomic import write_atomically
from .distributed import World
from .run_folder import TEACHERS, RunExistsError, has_trained
from .teachers.teacher_hash import difference

Teachers = list[tuple[str, str]]  # source and hash of each


def agreed(sources: Sequence[str], hashes: Sequence[str], world: World) -> Teachers:
    """The teachers of this process, whose weights must be those in all others.

    Raises:
        ValueError: a process has another one than rank 0; in every process, with the teacher's name.
    """
    short = [int(digest[:15], 16) for digest in hashes]  # code and attributes may know their process
    of_all = world.gather(torch.tensor(short, dtype=torch.int64, device=world.device))
    for rank, numbers in enumerate(of_all.tolist()):
        for source, number, first in zip(sources, numbers, of_all[0].tolist(), strict=True):
            if number != first:
                raise ValueError(
                    f"teacher {source} is not the same in all processes: process {rank} has another one than process "
                    "0; give all of them the same files"
                )
    return [(str(source), digest) for source, digest in zip(sources, hashes, strict=True)]


def write(out: Path, teachers: Teachers, anew: bool) -> None:
    """Write the teachers into a run's folder; unless it starts `anew`, what is there stays."""
    path = out / TEACHERS
    if teachers and (anew or not path.exists()):
        listed = [{"source": source, "hash": digest} for source, digest in teachers]
        write_atomically(path, (json.dumps(listed, indent=1) + "\n").encode())


def read(out: Path) -> Teachers | None:
    """The teachers that a run has learned from; None if it has not trained, had none, or is of an earlier version.

    Raises:
        ValueError: the file is damaged.
    """
    path = out / TEACHERS
    if not path.exists() or not has_trained(out):
        return None
    try:
        return [(str(teacher["source"]), str(teacher["hash"])) for teacher in json.loads(path.read_bytes())]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error


def check_resumed(out: Path, teachers: Teachers) -> None:
    """Check that a run may go on with these teachers.

    Raises:
        RunExistsError: it has learned from others; the message names the teacher and says what to do.
    """
    if fault := _fault(read(out), teachers):
        raise RunExistsError(
            f"{out} cannot be resumed: {fault} than when the run learned from it: --resume with the teacher as it was "
            f"goes on, --overwrite starts again with the new one (without {out / TEACHERS} teachers are not compared)"
        )


def check_compared(out: Path, teachers: Teachers, others: Sequence[Path]) -> None:
    """Check that a run of a comparison has the teachers of its other runs.

    Raises:
        RunExistsError: another run has learned from others; the message names it, the teacher, and what to do.
    """
    for other in others:
        if fault := _fault(read(other), teachers):
            raise RunExistsError(
                f"{out} and {other} cannot be compared: {fault} than when {other} learned from it: --overwrite trains "
                "all runs again with the new one, another --out starts another comparison"
            )


def _fault(before: Teachers | None, now: Teachers) -> str:
    """The first teacher that has changed, and how; empty if none has."""
    for (source, old), (name, new) in zip(before or [], now, strict=False):
        if source == name and old != new:
            return f"teacher {name} {difference(old, new)}"
    return ""
