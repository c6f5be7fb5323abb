"""Spot check: finished cells, trained again from the same teachers, must give bit-identical accuracies."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...system import link_folder
from . import cells, conductor
from .cells import Cell
from .records import Results, collect
from .work import Origin


@dataclass(frozen=True)
class Checked:
    """Accuracy of one cell from both runs."""

    cell: Cell
    kept: float
    again: float | None  # None if the second run failed

    @property
    def agrees(self) -> bool:
        return self.kept == self.again


def choose(results: Results, count: int, seed: int) -> list[Cell]:
    """A random sample of `count` finished cells, or all if there are fewer."""
    finished = sorted(results.cells)
    return random.Random(seed).sample(finished, min(count, len(finished)))


def check(
    results: Results, out: Path, origin: Origin, chosen: list[Cell], jobs: int, progress: Callable[[str], None]
) -> list[Checked]:
    """Train the chosen cells again in a temporary folder, with the teachers of `out` and new caches.

    Teachers that `out` lacks are trained first and kept there.
    """
    study = results.study
    with tempfile.TemporaryDirectory(dir=out, prefix=".check-") as folder:
        scratch = Path(folder)
        needed = cells.teachers_of(study, cells.pools_of(study, chosen))
        (scratch / "teachers").mkdir()
        for spec in needed:
            kept = cells.teacher_folder(out, spec.name).resolve()
            kept.mkdir(parents=True, exist_ok=True)
            link_folder(cells.teacher_folder(scratch, spec.name), kept)
        conductor.conduct(study, scratch, origin, jobs=jobs, progress=progress, only=chosen)
        again = collect(study, scratch).cells
    return [
        Checked(cell, results.cells[cell]["test_accuracy"], again[cell]["test_accuracy"] if cell in again else None)
        for cell in chosen
    ]
