"""Teachers that run ahead of the student, beside its step: every bit is that of steps whose teachers come first."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from camkd_fast.data.augment import Augmentation
from camkd_fast.data.batch import Batch, LoaderConfig
from camkd_fast.data.resident import ResidentLoader
from camkd_fast.train import strategies, teacher_ahead
from camkd_fast.train.config import LogConfig, OptimConfig, PrecisionConfig
from camkd_fast.train.step import TrainStep
from camkd_fast.train.step_graph import WARM_UP
from camkd_fast.train.strategies import names
from camkd_fast.train.sums import NonFiniteLossError
from camkd_fast.train.teacher_ahead import ahead_for, with_following
from camkd_fast.train.teachers.live import LiveTeachers
from camkd_fast.train.trainer import Trainer
from tests.support.recorded_graph import RecordedGraphs
from tests.support.training import CLASSES, EAGER, ONE, OPTIM, SmallNet, batch, images, parameters, train_step, trainer
from tests.train.test_loop import Recorder
from tests.train.test_step_graph import batches, take

CPU = torch.device("cpu")
OFF = replace(EAGER, teacher_ahead="off")
LOG = LogConfig(tensorboard=False, progress=False, log_every=1, checkpoint_every=1)
pytestmark = pytest.mark.usefixtures("one_thread")


def both(strategy: str = "ca-mkd", precision: PrecisionConfig = EAGER, **settings: Any) -> tuple[TrainStep, TrainStep]:
    """Two recorded steps, with and without teachers that run ahead."""
    off = replace(precision, teacher_ahead="off")
    student = settings.pop("student", SmallNet)
    ahead, other = (
        train_step(strategy, student(), precision=p, recorder=RecordedGraphs(), **settings) for p in (precision, off)
    )
    assert not other.looks_ahead
    return ahead, other


def assert_equal(one: TrainStep, two: TrainStep) -> None:
    assert torch.equal(parameters(one), parameters(two))
    buffers = (step.trainable.buffers() for step in (one, two))
    assert all(torch.equal(mine, other) for mine, other in zip(*buffers, strict=True))
    assert one.sums.read(ONE) == two.sums.read(ONE)


class Counted(LiveTeachers):
    """Teachers that keep the batches they saw."""

    def __init__(self) -> None:
        super().__init__([SmallNet(6, seed=10), SmallNet(7, seed=11)], CLASSES)
        self.seen: list[Tensor] = []

    def outputs(self, images: Tensor, inputs: Sequence[Tensor] = ()) -> list[Any]:
        self.seen.append(images.clone())
        return super().outputs(images, inputs)


@pytest.mark.parametrize("name", names())
def test_steps_are_the_same(name: str) -> None:
    ahead, other = both(name, student=lambda: SmallNet(batch_norm=True, dropout=0.5))
    assert ahead.looks_ahead == (name != "ce")
    for step in (ahead, other):
        take(step, WARM_UP + 6)
    assert_equal(ahead, other)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_and_skipped_steps(dtype: str) -> None:
    ahead, other = both(precision=replace(EAGER, dtype=dtype))
    for step in (ahead, other):
        if dtype == "float16":
            step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)  # the first steps overflow
        take(step, 30)
    assert ahead.scaler.get_scale() == other.scaler.get_scale()
    assert_equal(ahead, other)


@pytest.mark.parametrize("sizes", [(32,) * 8, (32, 32, 20), (20, 32), (32, 20, 20, 32, 32, 32)])
def test_batches_of_other_sizes(sizes: tuple[int, ...]) -> None:
    ahead, other = both()
    for step in (ahead, other):
        take(step, 4 * len(sizes), size=lambda i: sizes[i % len(sizes)])
    assert_equal(ahead, other)


def test_each_batch_passes_the_teachers_once() -> None:
    """Eagerly first; then those of the next batch are part of the recording, and of all its replays."""
    teachers = Counted()
    with torch.random.fork_rng(devices=[]):
        strategy = strategies.create("ca-mkd", teachers, 8)
    graphs = RecordedGraphs()
    step = TrainStep(SmallNet(), strategy, teachers, OPTIM, EAGER, ONE, 32, 0, graphs)
    given = batches(WARM_UP + 4)
    take(step, len(given))
    # The first batch before the first step, then the next one's in each; in the last step there is none.
    assert len(teachers.seen) == 1 + WARM_UP + 1
    for seen, expected in zip(teachers.seen[:-1], given, strict=False):
        assert torch.equal(seen, expected.images)
    assert (graphs.recordings, graphs.replays) == (1, 4)


def test_the_recorded_memory_stays() -> None:
    step, _ = both()
    take(step, WARM_UP + 1)
    assert step._ahead is not None and step._ahead._ready is not None
    before = [tensor.data_ptr() for tensor in step._ahead._ready.tensors()]
    take(step, 3, first=20)
    assert [tensor.data_ptr() for tensor in step._ahead._ready.tensors()] == before


def test_the_branches_may_run_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU they run at the same time: neither reads what the other writes."""

    def reversed_(tasks: Sequence[Any], device: torch.device) -> list[Any]:
        return [task() for task in reversed(tasks)][::-1]

    ahead, other = both(student=lambda: SmallNet(batch_norm=True, dropout=0.5))
    monkeypatch.setattr(teacher_ahead, "side_by_side", reversed_)
    for step in (ahead, other):
        take(step, WARM_UP + 5)
    assert_equal(ahead, other)


def test_another_batch_than_the_announced_one() -> None:
    ahead, other = both()
    for step in (ahead, other):
        given = batches(12)
        for i, one in enumerate(given):
            step(one, 32, 0.01, i, given[(7 * i) % 12])
    assert_equal(ahead, other)


def test_a_full_batch_of_a_larger_step_between() -> None:
    ahead, other = both()
    for step in (ahead, other):
        given = batches(WARM_UP + 6)
        for i, (one, following) in enumerate(with_following(given, step.looks_ahead)):
            step(one, 64 if i == WARM_UP + 2 else 32, 0.01, i, following)
    assert_equal(ahead, other)


def test_a_loss_that_is_not_finite_is_that_of_its_step() -> None:
    step, _ = both()
    given = batches(WARM_UP + 4)
    given[WARM_UP + 1] = given[0]._replace(images=given[0].images * float("nan"))
    for i, (one, following) in enumerate(with_following(given, True)):
        step(one, 32, 0.01, i, following)
        if i == WARM_UP:
            step.sums.read(ONE)  # the teachers of the bad batch have run
    with pytest.raises(NonFiniteLossError, match=f"not finite at step {WARM_UP + 2}"):
        step.sums.read(ONE)


def test_loaders_that_finish_in_the_step() -> None:
    """Of two loaders, whose batches are augmented inside the graph. The second one's first batch is announced, but its
    crops lie outside of the first one's pixels.
    """
    ahead, other = both()
    config = LoaderConfig(32, augmentation=Augmentation(padding=1), deferred=True)
    for step in (ahead, other):
        loaders = [ResidentLoader(images(32 * (WARM_UP + 2) * i, seed=i), config) for i in (1, 2)]
        given = [one for loader in loaders for one in loader]
        for i, (one, following) in enumerate(with_following(given, step.looks_ahead)):
            step(one, 32, 0.01, i, following)
    assert_equal(ahead, other)


# --- runs ------------------------------------------------------------------------------------------------------------


def run_of(out: Path, precision: PrecisionConfig, deferred: bool = False) -> Trainer:
    """150 images in steps of 32, so that each epoch has a smaller last batch; a checkpoint after every step."""
    step = train_step(student=SmallNet(dropout=0.3), precision=precision, recorder=RecordedGraphs())
    run = trainer(out, step, log=LOG, optim=OptimConfig(epochs=2, batch_size=32))
    run.train = ResidentLoader(images(150), replace(run.train.config, deferred=deferred))
    return run


def records(journal: Recorder) -> list[dict[str, Any]]:
    seconds = ("images_per_second", "start_seconds")
    return [{name: value for name, value in r.items() if name not in seconds} for r in journal.records]


def trained(run: Trainer) -> list[dict[str, Any]]:
    journal = Recorder()
    run.run(journal)
    return records(journal)


def saved(folder: Path) -> dict[str, Any]:
    """The bytes of all checkpoints by file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("deferred", [False, True])
def test_a_run_and_its_checkpoints(deferred: bool, tmp_path: Path) -> None:
    runs = [run_of(tmp_path / p.teacher_ahead, p, deferred) for p in (EAGER, OFF)]
    ahead, other = (trained(run) for run in runs)
    assert runs[0].step.looks_ahead and ahead == other
    assert torch.equal(parameters(runs[0].step), parameters(runs[1].step))
    first, second = (saved(tmp_path / p.teacher_ahead) for p in (EAGER, OFF))
    assert len(first) > 2 and first == second


@pytest.mark.parametrize("after", [2, 4, 5, 7])
def test_a_resumed_run(after: int, tmp_path: Path) -> None:
    """Killed after so many steps; 4 is before the smaller batch, 5 the end of an epoch."""

    take_step = TrainStep.__call__

    def killed(step: TrainStep, batch: Batch, items: int, rate: float, number: int, following: Batch | None) -> None:
        if number == after:
            raise KeyboardInterrupt
        take_step(step, batch, items, rate, number, following)

    def resumed(precision: PrecisionConfig) -> tuple[Tensor, list[dict[str, Any]]]:
        out = tmp_path / precision.teacher_ahead
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(TrainStep, "__call__", killed)
            run_of(out, precision).run(Recorder())
        again = run_of(out, precision)
        checkpoint = again.checkpoints.latest()
        assert checkpoint is not None and checkpoint.step == after
        again.resume(checkpoint)
        return parameters(again.step), trained(again)

    (one, first), (two, second) = resumed(EAGER), resumed(OFF)
    assert torch.equal(one, two) and first == second


def test_the_position_leaves_out_the_batch_that_was_read_ahead() -> None:
    loader = ResidentLoader(images(150), LoaderConfig(32, augmentation=Augmentation(padding=1)))
    pairs = with_following(loader, True)
    for _ in range(2):
        next(pairs)
    assert loader.state_dict()["batch"] == 3 and loader.state_dict(unused=1)["batch"] == 2


@pytest.mark.parametrize("ahead", [False, True])
def test_batches_and_those_after_them(ahead: bool) -> None:
    read: list[int] = []

    def loader(count: int) -> Iterator[Batch]:
        for i in range(count):
            read.append(i)
            yield batch(2, seed=i)

    for count in (0, 1, 4):
        read.clear()
        pairs = []
        for i, pair in enumerate(with_following(loader(count), ahead)):
            pairs.append(pair)
            assert read == list(range(min(i + 1 + ahead, count)))
        assert len(pairs) == count
        for i, (_, following) in enumerate(pairs):
            assert (following is pairs[i + 1][0]) if ahead and i + 1 < count else following is None


# --- settings --------------------------------------------------------------------------------------------------------


class Drawing(SmallNet):
    """A teacher whose dropout is always on."""

    def forward_head(self, features: Tensor) -> Tensor:
        return self.fc(F.dropout(features.mean((2, 3)), 0.5, training=True))


def test_teachers_that_draw_random_numbers_run_with_the_step(caplog: pytest.LogCaptureFixture) -> None:
    def step(precision: PrecisionConfig) -> TrainStep:
        teachers = LiveTeachers([Drawing(6, seed=10)], CLASSES)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            strategy = strategies.create("aver", teachers, 8)
        student = SmallNet(dropout=0.5)
        return TrainStep(student, strategy, teachers, OPTIM, precision, ONE, 32, 0, RecordedGraphs())

    ahead, other = step(EAGER), step(OFF)
    with caplog.at_level(logging.WARNING):
        for one in (ahead, other):
            take(one, WARM_UP + 4)
    assert caplog.messages == ["teachers do not run ahead of the student: they draw random numbers"]
    assert not ahead.looks_ahead
    assert_equal(ahead, other)


class Cached(Counted):
    computes = False  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("teachers", "graph", "reason"),
    [
        (Counted, True, None),
        (Counted, False, "steps are not replayed as a CUDA graph"),
        (Cached, True, "their outputs are replayed from a cache"),
        (None, True, "there are no teachers"),
    ],
)
def test_where_nothing_can_run_ahead_the_option_says_so(
    teachers: Any, graph: bool, reason: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    given = None if teachers is None else teachers()
    for wanted in ("auto", "off", "on"):
        precision = replace(EAGER, teacher_ahead=wanted)
        assert caplog.messages == []
        assert (ahead_for(precision, CPU, graph, given) is None) == (wanted == "off" or reason is not None)
    assert caplog.messages == ([] if reason is None else [f"teachers do not run ahead of the student: {reason}"])


def test_an_unknown_value() -> None:
    with pytest.raises(ValueError, match="teacher_ahead must be one of auto, on, off, got 'maybe'"):
        replace(EAGER, teacher_ahead="maybe")
