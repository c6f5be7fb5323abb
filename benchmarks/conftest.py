"""Command-line options of the suites, and the recorder that writes the JSON file and the table of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import environment, results, suite_tables, timer

SUMMARIES: list[str] = []  # tables of this session, printed at its end


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("camkd-fast")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    group.addoption("--device", choices=("cpu", "cuda"), default=default, help="default: cuda if a GPU is available")
    group.addoption("--shapes", choices=("quick", "full"), default="full", help="size of the grid (default: full)")
    group.addoption("--seconds", type=float, help="seconds per test (default: set by each suite)")
    group.addoption(
        "--max-autotune", action="store_true", help="time this mode of torch.compile where it is not by default: on a "
        "CPU, and with --shapes quick; it compiles for minutes"
    )  # fmt: skip
    group.addoption("--out", type=Path, help="folder for the JSON files (default: benchmarks/results/<device>)")


def pytest_configure(config: pytest.Config) -> None:
    if torch.are_deterministic_algorithms_enabled():
        raise pytest.UsageError(
            "deterministic algorithms are on, so torch fills new memory: run the benchmarks in a process of their own"
        )


@dataclass
class Suite:
    """Settings and results of one benchmark file."""

    device: torch.device
    name: str
    folder: Path
    environment: dict[str, str]
    copy_gb_per_s: float
    max_autotune: bool
    _seconds: float | None
    rows: list[results.Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)  # further numbers of the whole run

    def seconds(self, default: float) -> float:
        return default if self._seconds is None else self._seconds

    def record(self, benchmark: Any, row: results.Row) -> None:
        """Add a row and write the file, which is valid after every row; copy the row to pytest-benchmark's output."""
        row["clocks_mhz"] = environment.clocks(self.device)
        self.rows.append(row)
        results.write(self.folder, self.name, self.result())
        if benchmark is not None:
            benchmark.extra_info.update(row)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def result(self) -> dict[str, Any]:
        return {
            "environment": self.environment,
            "copy_gb_per_s": self.copy_gb_per_s,
            **self.extra,
            "rows": self.rows,
            "notes": self.notes,
        }


@pytest.fixture(scope="module")
def suite(request: pytest.FixtureRequest) -> Iterator[Suite]:
    option = request.config.option
    torch.manual_seed(0)
    device = torch.device(option.device)
    where = environment.describe(device)
    suite = Suite(
        device=device,
        name=request.module.__name__.rpartition(".")[2].removeprefix("bench_"),
        folder=option.out or environment.results_folder(where),
        environment=where,
        copy_gb_per_s=timer.copy_bandwidth(device, option.seconds or 2.0),
        max_autotune=option.max_autotune or (device.type == "cuda" and option.shapes == "full"),
        _seconds=option.seconds,
    )
    yield suite
    if suite.rows:
        path = results.write(suite.folder, suite.name, suite.result())  # notes may come after the last row
        SUMMARIES.append(f"{suite_tables.text(suite.name, suite.result())}\nwritten to {path}")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for text in SUMMARIES:
        terminalreporter.write_line(f"\n{text}")
