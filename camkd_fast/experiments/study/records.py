"""Results of a study as a sorted JSON-lines file: equal results give equal bytes and readable diffs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...system import utf8_text
from ...train.atomic import write_atomically
from . import cells
from .cells import Cell
from .spec import StudyConfig
from .work import RECORD, Record


@dataclass
class Results:
    """Records that match the current settings of the study."""

    study: StudyConfig
    teachers: dict[str, Record] = field(default_factory=dict)
    pools: dict[str, Record] = field(default_factory=dict)
    cells: dict[Cell, Record] = field(default_factory=dict)

    @property
    def missing(self) -> list[Cell]:
        return [cell for cell in cells.cells(self.study) if cell not in self.cells]

    @property
    def origin(self) -> str:
        """Machines and commits of the results; empty without results."""
        records = [*self.teachers.values(), *self.pools.values(), *self.cells.values()]
        where, commits = (sorted({record[name] for record in records}) for name in ("where", "commit"))
        return f"{', '.join(where)}; commit {', '.join(commits)}" if records else ""

    def add(self, records: Iterable[Record]) -> None:
        """Add the records whose hash matches the current study; a later record replaces an earlier one."""
        teachers = {spec.name: cells.teacher_hash(self.study, spec.name) for spec in self.study.teachers}
        pools = {pool.name: cells.pool_hash(self.study, pool) for pool in self.study.pools}
        hashes = {cell: cells.cell_hash(self.study, cell) for cell in cells.cells(self.study)}
        for record in records:
            if record["kind"] == "cell":
                cell = cell_of(record)
                if hashes.get(cell) == record["hash"]:
                    self.cells[cell] = record
            else:
                known, into = (teachers, self.teachers) if record["kind"] == "teacher" else (pools, self.pools)
                if known.get(record["name"]) == record["hash"]:
                    into[record["name"]] = record

    def write(self, path: Path) -> None:
        """Write one JSON line per record: teachers, pools, then cells, each sorted by name."""
        parts: list[dict[Any, Record]] = [self.teachers, self.pools, self.cells]
        lines = [json.dumps(part[name]) + "\n" for part in parts for name in sorted(part)]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(lines).encode())


def cell_of(record: Record) -> Cell:
    return Cell(record["pool"], record["student"], record["variant"], record["seed"])


def read(study: StudyConfig, path: Path) -> Results:
    """The results in a file; empty if the file does not exist.

    Raises:
        ValueError: a line is not a JSON record; the message has file and line.
    """
    results, records = Results(study), []
    if path.exists():
        for number, line in enumerate(utf8_text(path).splitlines(), 1):
            try:
                record = json.loads(line)
                record["kind"], record["hash"]
            except (json.JSONDecodeError, TypeError, KeyError) as error:
                raise ValueError(f"{path}, line {number} is no record: {error}") from error
            records.append(record)
    results.add(records)
    return results


def collect(study: StudyConfig, out: Path, into: Results | None = None) -> Results:
    """Add the records in the folder of a study to earlier results, by default to none."""
    results = Results(study) if into is None else into
    folders = [
        *(cells.teacher_folder(out, spec.name) for spec in study.teachers),
        *(cells.cache_folder(out, pool.name) for pool in study.pools),
        *(cells.cell_folder(out, cell) for cell in cells.cells(study)),
    ]
    paths = [folder / RECORD for folder in folders]
    results.add(json.loads(path.read_bytes()) for path in paths if path.exists())
    return results
