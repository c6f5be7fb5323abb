"""Output of a run: metrics that survive a kill, TensorBoard events, the progress bar."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from camkd_fast.train.config import LogConfig
from camkd_fast.train.journal import METRICS, Journal, read_metrics

QUIET = LogConfig(tensorboard=False, progress=False)


def test_journal_drops_what_a_resumed_run_will_say_again(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    lines = [{"kind": kind, "step": step, "epoch": 1} for kind, step in [("steps", 5), ("epoch", 10), ("steps", 12)]]
    lines.append({"kind": "test", "step": 10, "epoch": 1})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "epo')  # killed while writing
    assert len(read_metrics(path)) == 4
    journal = Journal(tmp_path, QUIET, steps=20, step=10, title="")
    journal.write({"kind": "steps", "step": 12, "epoch": 2})
    journal.close()
    assert [(r["kind"], r["step"]) for r in read_metrics(path)] == [("steps", 5), ("epoch", 10), ("steps", 12)]
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 1 is not JSON"):
        read_metrics(path)


def test_what_a_damaged_file_lacks_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    good = '{"kind": "epoch", "step": 1, "parts": {"harf": 1.0}}\n'
    path.write_text(good + '{"kinf": "epoch"}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is damaged: it has no 'kind', only kinf"):
        read_metrics(path, "epoch")
    path.write_text(good)
    (record,) = read_metrics(path)
    for part, name in ((record, "epoch"), (record["parts"], "hard")):
        with pytest.raises(ValueError, match=f"metrics.jsonl, line 1 is damaged: it has no '{name}', only"):
            part[name]
    assert copy.deepcopy(record) == record == dict(record)
    path.write_text("[1, 2]\n")
    with pytest.raises(ValueError, match=r"line 1 is damaged: it holds no record, but \[1, 2\]"):
        read_metrics(path)
    path.write_bytes(b'{"kind": "\xff"}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl is not UTF-8: invalid start byte at byte 10"):
        read_metrics(path)


def test_tensorboard_holds_every_number(tmp_path: Path) -> None:
    journal = Journal(tmp_path, LogConfig(progress=False), steps=10, step=0, title="")
    for step in (5, 10):
        journal.write({"kind": "epoch", "step": step, "epoch": 1, "loss": 1.0 / step, "weights": [0.25, 0.75]})
    journal.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"epoch/epoch", "epoch/loss", "epoch/weights/0", "epoch/weights/1"}
    assert [(e.step, round(e.value, 4)) for e in events.Scalars("epoch/loss")] == [(5, 0.2), (10, 0.1)]


def test_progress_bar_counts_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = Journal(tmp_path, LogConfig(tensorboard=False), steps=10, step=4, title="student on digits")
    journal.write({"kind": "epoch", "step": 10, "epoch": 1, "loss": 0.5, "images_per_second": 0.0})
    journal.close()
    shown = capsys.readouterr().err
    assert "images_per_second" not in shown
    assert "student on digits" in shown and "4/10" in shown and "10/10" in shown and "loss=0.5" in shown
