"""Comparison of strategies over seeds with one student and its teachers. Each cell is a run; finished runs are kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ..train import run, run_teachers, strategies
from ..train.config import DistillConfig
from ..train.journal import METRICS, read_metrics, result_record
from ..train.run_folder import is_finished
from ..train.teachers.runs import load_source

BASELINE = strategies.AVER.name  # reference of the paired differences


@dataclass(frozen=True)
class CompareConfig:
    """Train the same student with every strategy from every seed; no strategy and no seed is there twice."""

    strategies: tuple[str, ...] = field(default_factory=strategies.names)
    """Strategies to compare, each with the same alpha."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of every strategy; equal seeds have equal initial parameters and image order."""
    student: DistillConfig = field(default_factory=DistillConfig)
    """All other settings; its strategy and seed are ignored, its `out` is the comparison's folder."""

    @property
    def out(self) -> Path:
        return self.student.out

    def cells(self) -> Iterator[DistillConfig]:
        """The runs, seed by seed: a comparison that is stopped early has complete seeds.

        Raises:
            ValueError: no strategy has such a name; the message lists the nearest.
        """
        for seed in self.seeds:
            for name in self.strategies:
                yield self.cell(name, seed)

    def cell(self, strategy: str, seed: int) -> DistillConfig:
        """One run, in `out/STRATEGY/seed-N`, without the options that its strategy refuses."""
        taken = strategies.find(strategy).options
        refused: dict[str, Any] = {name: value for name, value in strategies.UNSET.items() if name not in taken}
        return replace(self.student, strategy=strategy, seed=seed, out=self.out / strategy / f"seed-{seed}", **refused)


@dataclass(frozen=True)
class Row:
    """Results of one strategy, in the order of the seeds."""

    strategy: str
    test_accuracy: Sequence[float]
    images_per_second: float  # mean over the runs that have one; 0 if none has
    epochs: Sequence[Sequence[Mapping[str, Any]]]  # the "epoch" records of each run

    @property
    def mean(self) -> float:
        return mean(self.test_accuracy)

    @property
    def spread(self) -> float:
        """Sample standard deviation over seeds; 0 for a single one."""
        return spread(self.test_accuracy)

    def gains(self, baseline: Row) -> list[float]:
        """Difference of test accuracy to another strategy, per seed."""
        return [mine - theirs for mine, theirs in zip(self.test_accuracy, baseline.test_accuracy, strict=True)]


def spread(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 for a single value."""
    return stdev(values) if len(values) > 1 else 0.0


def check_teachers(config: CompareConfig) -> None:
    """Load each teacher before the first cell is trained, if one of several strategies may refuse it.

    Raises:
        ValueError: strategies need teachers, but none were given.
        ValueError, OSError, CheckpointError: as `load_source`.
    """
    learning = [name for name in config.strategies if strategies.find(name).needs_teachers]
    if learning and not config.student.teachers:
        raise ValueError(f"{', '.join(learning)} learn from teachers, but none were given")
    needing = [strategies.find(name) for name in config.strategies if strategies.find(name).needs_features]
    if needing and not all(is_finished(cell.out) for cell in config.cells()):
        for teacher in config.student.teachers:
            load_source(teacher, needing[0])


def run_cell(cell: DistillConfig, overwrite: bool = False, extend: bool = False, compared: Sequence[Path] = ()) -> None:
    """Train one cell, resume it, or keep it if it is finished; `extend` and `compared` as in `run.distill`.

    Raises:
        RunExistsError: its folder holds a run with other settings; the message has the differences.
        As `run.distill`.
    """
    run.distill(cell, resume=not overwrite, overwrite=overwrite, extend=extend and not overwrite, compared=compared)


def kept(config: CompareConfig, number: int, overwrite: bool) -> list[Path]:
    """Folders of the other cells whose results stay beside those of a cell: all that `overwrite` does not remove yet.

    Args:
        number: of the cell, from 0.
    """
    folders = [cell.out for cell in config.cells()]
    return folders[:number] if overwrite else folders[:number] + folders[number + 1 :]


def collect(config: CompareConfig) -> list[Row]:
    """Results of all cells.

    Raises:
        ValueError, OSError: a cell is missing or not finished; the message names it.
        RunExistsError: two cells have learned from different teachers; the message names both.
    """
    _check_same_teachers([cell.out for cell in config.cells()])
    rows = []
    for name in config.strategies:
        cells = [config.cell(name, seed) for seed in config.seeds]
        tests, epochs = [], []
        for cell in cells:
            if not is_finished(cell.out):
                raise ValueError(f"{cell.out} holds no finished run")
            tests.append(result_record(cell.out / METRICS))
            epochs.append(read_metrics(cell.out / METRICS, "epoch"))
        speeds = [test["images_per_second"] for test in tests if test["images_per_second"]]  # 0 of too few steps
        speed = mean(speeds) if speeds else 0.0
        rows.append(Row(name, [test["test_accuracy"] for test in tests], speed, epochs))
    return rows


def _check_same_teachers(folders: Sequence[Path]) -> None:
    for number, folder in enumerate(folders):
        if teachers := run_teachers.read(folder):
            run_teachers.check_compared(folder, teachers, folders[:number])


def baseline(rows: Sequence[Row]) -> Row | None:
    """The row of the baseline, if it was compared."""
    return next((row for row in rows if row.strategy == BASELINE), None)


def as_json(config: CompareConfig, rows: Sequence[Row]) -> dict[str, Any]:
    """Settings and results for JSON; paths are not converted."""
    aver = baseline(rows)
    return {
        "strategies": list(config.strategies),
        "seeds": list(config.seeds),
        "student": asdict(config.student),
        "results": [
            {
                "strategy": row.strategy,
                "test_accuracy": {"mean": row.mean, "std": row.spread, "seeds": list(row.test_accuracy)},
                **({} if aver is None else {"difference_to_aver": _gain(row.gains(aver))}),
                "images_per_second": row.images_per_second,
            }
            for row in rows
        ],
    }


def _gain(gains: Sequence[float]) -> dict[str, Any]:
    return {"mean": mean(gains), "std": spread(gains), "seeds": list(gains)}
