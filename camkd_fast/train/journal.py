"""Output of a run while it trains, by rank 0: metrics.jsonl, TensorBoard events and a progress bar."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from ..system import utf8_text
from .atomic import write_atomically
from .config import LogConfig

METRICS = "metrics.jsonl"
Record = Mapping[str, Any]


def read_metrics(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl in order, all or of one kind ("steps", "epoch", "test").

    Every record has "kind", "step" and "epoch", both counted from 1. An incomplete last line is skipped: the process
    was killed while writing it.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8, or a line before the last is no record; the message has file and line. Reading what
            a record lacks raises it too.
    """
    lines = utf8_text(path).splitlines(keepends=True)
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            content = json.loads(line, object_hook=partial(_ReadRecord, where=where))
        except json.JSONDecodeError as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise ValueError(f"{where} is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{where} is damaged: it holds no record, but {content!r}")
        records.append(content)
    return [record for record in records if kind in (None, record["kind"])]


def result_record(path: Path) -> dict[str, Any]:
    """The record of the test images, the last of a finished run.

    Raises:
        As `read_metrics`; ValueError: there is none.
    """
    records = read_metrics(path, "test")
    if not records:
        raise ValueError(f"{path} is damaged: it has no record of the test images, with which a finished run ends")
    return records[-1]


class _ReadRecord(dict[str, Any]):
    """A record, or a part of one, that says where in which file it lacks something."""

    def __init__(self, content: Any = (), where: str = "a record") -> None:
        super().__init__(content)
        self._where = where

    def __missing__(self, name: str) -> Any:
        raise ValueError(f"{self._where} is damaged: it has no {name!r}, only {', '.join(self)}")


class Journal:
    """Writes each record to every output.

    Args:
        out: run folder.
        steps: total steps of the run, for the progress bar.
        step: position from which the run resumes; later records are dropped, since the run writes them again.
        title: of the progress bar.
    """

    def __init__(self, out: Path, log: LogConfig, steps: int, step: int, title: str) -> None:
        path = out / METRICS
        if path.exists():
            kept = [r for r in read_metrics(path) if r["step"] <= step and r["kind"] != "test"]
            write_atomically(path, "".join(map(_line, kept)).encode())
        self._file: TextIO = path.open("a", encoding="utf-8")
        self._bar: Any = None
        self._events: Any = None
        if log.progress:
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=step, unit="step", desc=title, dynamic_ncols=True)
        if log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def write(self, record: Record) -> None:
        """Append a line to metrics.jsonl, write its numbers as TensorBoard scalars, update the bar."""
        self._file.write(_line(record))
        self._file.flush()
        if record["kind"] == "test":  # the model file, which comes next, says that the run is finished
            os.fsync(self._file.fileno())
        step = record["step"]
        if self._events is not None:
            for name, value in _scalars(record):
                self._events.add_scalar(f"{record['kind']}/{name}", value, step)
            self._events.flush()
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            shown = ("loss", "validation_accuracy", "images_per_second")
            values = {name: record[name] for name in shown if name in record}
            if not values.get("images_per_second", 1.0):  # too few steps to time
                del values["images_per_second"]
            self._bar.set_postfix({name: f"{value:,.4g}" for name, value in values.items()})

    def note(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self._bar is not None:
            self._bar.write(text)

    def close(self) -> None:
        self._file.close()
        if self._bar is not None:
            self._bar.close()
        if self._events is not None:
            self._events.close()


class NullJournal:
    """The journal of all other ranks; it writes nothing."""

    def write(self, record: Record) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def _line(record: Record) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _scalars(record: Record) -> list[tuple[str, float]]:
    """(name, value) of every number; list entries are named name/position."""
    out: list[tuple[str, float]] = []
    for name, value in record.items():
        if isinstance(value, Sequence) and not isinstance(value, str):
            out += [(f"{name}/{k}", number) for k, number in enumerate(value)]
        elif isinstance(value, (int, float)) and name != "step":
            out.append((name, value))
    return out
