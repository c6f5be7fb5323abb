"""Strategies x seeds: the same student from the same teachers, each cell a run of its own, finished ones kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ..train import run, strategies
from ..train.config import DistillConfig
from ..train.journal import METRICS, read_metrics
from ..train.run_folder import is_finished

BASELINE = strategies.AVER.name  # what the others are compared with, seed by seed


@dataclass(frozen=True)
class CompareConfig:
    """Train the same student with every strategy from every seed."""

    strategies: tuple[str, ...] = field(default_factory=strategies.names)
    """Strategies to compare, each with the same alpha."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of every strategy; equal seeds have equal first parameters and image order."""
    student: DistillConfig = field(default_factory=DistillConfig)
    """Everything else; its strategy and seed do not count, its `out` is the comparison's folder."""

    def __post_init__(self) -> None:
        for name, values in (("strategies", self.strategies), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be one or more different ones, got {' '.join(map(str, values))}")
        for name in self.strategies:
            strategies.find(name)

    @property
    def out(self) -> Path:
        return self.student.out

    def cells(self) -> Iterator[DistillConfig]:
        """The runs, all strategies of a seed before the next seed: a comparison that is stopped early is a fair one."""
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
    """One strategy over all seeds, in their order."""

    strategy: str
    test_accuracy: Sequence[float]
    images_per_second: float  # mean over runs
    epochs: Sequence[Sequence[Mapping[str, Any]]]  # of each run, the "epoch" records of its metrics.jsonl

    @property
    def mean(self) -> float:
        return mean(self.test_accuracy)

    @property
    def spread(self) -> float:
        """Sample standard deviation over seeds; 0 for a single one."""
        return spread(self.test_accuracy)

    def gains(self, baseline: Row) -> list[float]:
        """Differences of test accuracy to another strategy, seed by seed."""
        return [mine - theirs for mine, theirs in zip(self.test_accuracy, baseline.test_accuracy, strict=True)]


def spread(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 for a single value."""
    return stdev(values) if len(values) > 1 else 0.0


def run_cell(cell: DistillConfig, overwrite: bool = False) -> None:
    """Train one cell, go on with it, or keep it if it is finished.

    Raises:
        RunExistsError: its folder holds a run with other settings, which are named.
        As `run.distill`.
    """
    run.distill(cell, resume=not overwrite, overwrite=overwrite)


def collect(config: CompareConfig) -> list[Row]:
    """What the finished cells say.

    Raises:
        ValueError, OSError: a cell is missing or not finished; it is named.
    """
    rows = []
    for name in config.strategies:
        cells = [config.cell(name, seed) for seed in config.seeds]
        tests, epochs = [], []
        for cell in cells:
            if not is_finished(cell.out):
                raise ValueError(f"{cell.out} holds no finished run")
            records = read_metrics(cell.out / METRICS)
            tests.append(next(record for record in records if record["kind"] == "test"))
            epochs.append([record for record in records if record["kind"] == "epoch"])
        speed = mean(test["images_per_second"] for test in tests)
        rows.append(Row(name, [test["test_accuracy"] for test in tests], speed, epochs))
    return rows


def baseline(rows: Sequence[Row]) -> Row | None:
    """The row of AVER, if it was compared."""
    return next((row for row in rows if row.strategy == BASELINE), None)


def as_json(config: CompareConfig, rows: Sequence[Row]) -> dict[str, Any]:
    """Settings and results, ready for JSON but for its paths."""
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
