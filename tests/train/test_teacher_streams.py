"""Teachers on streams of their own while a step is recorded: what each one waits for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from camkd_fast.train.teacher_ahead import StudentBatch, TeacherAhead
from camkd_fast.train.teachers.live import side_by_side


class Streams:
    """Stands for torch.cuda: which tasks each stream's work comes after, directly or by events."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.here = self.now = FakeStream(self)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        patch.setattr(torch.cuda, "current_stream", lambda device: self.now)
        patch.setattr(torch.cuda, "Stream", lambda device: FakeStream(self))
        patch.setattr(torch.cuda, "stream", self.switched)

    @contextlib.contextmanager
    def switched(self, stream: FakeStream) -> Iterator[None]:
        before, self.now = self.now, stream
        yield
        self.now = before


class FakeStream:
    def __init__(self, streams: Streams) -> None:
        self.streams, self.after = streams, set[str]()

    def record_event(self) -> set[str]:
        return set(self.after)

    def wait_event(self, event: set[str]) -> None:
        self.after |= event

    def wait_stream(self, other: FakeStream) -> None:
        self.after |= other.after


@pytest.mark.parametrize("K", [1, 2, 5])
def test_teachers_are_parallel_branches_of_a_recording(K: int, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Streams(monkeypatch)
    streams.here.after.add("images")
    before: list[set[str]] = []

    def task(k: int) -> Any:
        before.append(set(streams.now.after))
        streams.now.after.add(f"teacher {k}")
        return k

    assert side_by_side([partial(task, k) for k in range(K)], torch.device("cuda")) == list(range(K))
    assert before == [{"images"}] * K  # each waits for the images and for no other teacher
    assert streams.now is streams.here and streams.here.after == {"images", *(f"teacher {k}" for k in range(K))}


def test_teachers_that_run_ahead_do_not_wait_for_the_student(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Streams(monkeypatch)
    streams.here.after.add("inputs")
    before: dict[str, set[str]] = {}

    def work(name: str) -> None:
        before[name] = set(streams.now.after)
        streams.now.after.add(name)

    def some_batch() -> StudentBatch:
        return StudentBatch(torch.zeros(2, 3), torch.zeros(2), [])

    def prepare() -> StudentBatch:
        side_by_side([partial(work, f"teacher {k}") for k in range(2)], torch.device("cuda"))
        return some_batch()

    ahead = TeacherAhead(torch.device("cuda"))
    ahead._ready = some_batch()
    ahead.run(lambda batch: work("student"), prepare)
    assert before == {name: {"inputs"} for name in ("student", "teacher 0", "teacher 1")}
    assert streams.now is streams.here and streams.here.after == {"inputs", *before}
