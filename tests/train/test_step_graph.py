"""The training step as one graph: replays do what eager steps do, and what cannot be recorded runs eagerly."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from camkd_fast.data.augment import Augmentation
from camkd_fast.data.batch import Batch, LoaderConfig
from camkd_fast.data.resident import ResidentLoader
from camkd_fast.train import strategies
from camkd_fast.train.config import PrecisionConfig
from camkd_fast.train.config_file import build
from camkd_fast.train.distributed import World
from camkd_fast.train.journal import NullJournal
from camkd_fast.train.step import TrainStep
from camkd_fast.train.step_graph import WARM_UP, CudaRecorder, StepGraph, recorder_for
from camkd_fast.train.strategies import names
from camkd_fast.train.sums import NonFiniteLossError
from camkd_fast.train.teacher_ahead import with_following
from camkd_fast.train.teachers.cache import CachedTeachers
from tests.support.cache_parts import FakeLoader, Tiny, make_teachers
from tests.support.cache_parts import build as build_cache
from tests.support.recorded_graph import Operations, RecordedGraphs
from tests.support.training import EAGER, ONE, OPTIM, SmallNet, batch, images, parameters, train_step, trainer

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def graph_step(strategy: str = "ca-mkd", recorder: Any = None, **settings: Any) -> tuple[TrainStep, RecordedGraphs]:
    recorder = recorder or RecordedGraphs()
    return train_step(strategy, recorder=recorder, **settings), recorder


def take(step: TrainStep, count: int, first: int = 0, size: Callable[[int], int] = lambda i: 32) -> None:
    for i, (given, following) in enumerate(with_following(batches(count, first, size), step.looks_ahead), first):
        step(given, size(i), 0.01 * (1 + i), i, following)


def batches(count: int, first: int = 0, size: Callable[[int], int] = lambda i: 32) -> list[Batch]:
    return [batch(size(i), seed=i) for i in range(first, first + count)]


def relative(one: Tensor, two: Tensor) -> float:
    return float((one - two).norm() / two.norm())


def assert_same(one: TrainStep, two: TrainStep) -> None:
    """Up to rounding: the kernels' numbers are reduced by other operations inside a recording."""
    assert relative(parameters(one), parameters(two)) < 1e-6
    mine, other = one.sums.read(ONE).totals, two.sums.read(ONE).totals
    assert (mine.images, mine.correct) == (other.images, other.correct)
    for name in ("losses", "weights", "feature_weights"):
        assert getattr(mine, name) == pytest.approx(getattr(other, name), rel=1e-5)


@pytest.mark.parametrize("name", names())
def test_replays_train_as_eager_steps_do(name: str) -> None:
    """Every step has its own images, labels, rate and number."""
    step, recorder = graph_step(name)
    eager = train_step(name)
    for i in (step, eager):
        take(i, WARM_UP + 5)
    assert (recorder.recordings, recorder.replays) == (1, 5)
    assert_same(step, eager)


def test_each_replay_draws_its_own_random_numbers() -> None:
    step, _ = graph_step(student=SmallNet(dropout=0.5))
    eager = train_step(student=SmallNet(dropout=0.5))
    for i in (step, eager):
        take(i, WARM_UP + 4)
    assert_same(step, eager)


def test_batch_statistics_move_with_every_replay() -> None:
    step, _ = graph_step(student=SmallNet(batch_norm=True))
    eager = train_step(student=SmallNet(batch_norm=True))
    for i in (step, eager):
        take(i, WARM_UP + 4)
    assert_same(step, eager)
    ours, theirs = step.student.norm, eager.student.norm
    assert relative(ours.running_var, theirs.running_var) < 1e-6
    assert ours.num_batches_tracked == theirs.num_batches_tracked == WARM_UP + 4


def test_smaller_batches_run_eagerly_between_replays(caplog: pytest.LogCaptureFixture) -> None:
    step, recorder = graph_step()
    eager = train_step()
    with caplog.at_level(logging.INFO):
        for i in (step, eager):
            take(i, 12, size=lambda i: 20 if i % 4 == 3 else 32)
    assert caplog.messages == ["batches of 20 and not 32 images run without the CUDA graph"]
    assert (recorder.recordings, recorder.replays) == (1, 9 - WARM_UP)
    assert_same(step, eager)


def test_a_full_batch_of_a_larger_step_runs_eagerly() -> None:
    """Its divisor is not that of the recording."""
    step, recorder = graph_step()
    eager = train_step()
    for i in (step, eager):
        take(i, WARM_UP + 2)
        i(batch(32, seed=50), 64, 0.1, 9)
    assert recorder.replays == 2
    assert_same(step, eager)


def test_a_loss_that_is_not_finite_is_found_at_its_step() -> None:
    step, _ = graph_step()
    take(step, WARM_UP + 2)
    bad = batch(32)
    step(bad._replace(images=bad.images * float("nan")), 32, 0.01, WARM_UP + 2)
    step(batch(32), 32, 0.01, WARM_UP + 3)
    with pytest.raises(NonFiniteLossError, match=f"not finite at step {WARM_UP + 3}"):
        step.sums.read(ONE)


def test_sums_start_anew_after_a_reset() -> None:
    step, _ = graph_step()
    eager = train_step()
    for i in (step, eager):
        take(i, WARM_UP + 2)
        i.sums.read(ONE)
        i.sums.reset()
        with pytest.raises(RuntimeError, match="no step was taken"):
            i.sums.read(ONE)
        take(i, 2, first=10)
    assert_same(step, eager)
    assert step.sums.read(ONE).totals.images == 64


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision(dtype: str) -> None:
    precision = PrecisionConfig(compile="off", dtype=dtype)  # type: ignore[arg-type]
    step, recorder = graph_step(precision=precision)
    eager = train_step(precision=precision)
    for i in (step, eager):
        if dtype == "float16":
            i.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)  # the first steps overflow
        take(i, 40)
    assert recorder.replays == 40 - WARM_UP
    assert step.scaler.get_scale() == eager.scaler.get_scale()
    start = parameters(train_step(precision=precision))
    assert relative(parameters(step) - start, parameters(eager) - start) < 0.02


def test_a_state_continues_in_another_step() -> None:
    whole, _ = graph_step()
    take(whole, WARM_UP + 6)
    first, _ = graph_step()
    take(first, WARM_UP + 2)
    second, _ = graph_step()
    second.student.load_state_dict(first.student.state_dict())
    second.load_state_dict(first.state_dict())
    take(second, 4, first=WARM_UP + 2)
    assert relative(parameters(second), parameters(whole)) < 1e-6
    assert isinstance(first.state_dict()["optimizer"]["param_groups"][0]["lr"], float)


def test_a_loaded_state_reaches_the_recorded_graph() -> None:
    step, recorder = graph_step()
    take(step, WARM_UP + 1)
    student, state = copy.deepcopy((step.student.state_dict(), step.state_dict()))
    take(step, WARM_UP + 3, first=4)
    after = parameters(step)
    step.student.load_state_dict(student)
    step.load_state_dict(state)
    take(step, WARM_UP + 3, first=4)
    assert recorder.recordings == 2
    assert relative(parameters(step), after) < 1e-6


class Reading(strategies.AVER):
    """A strategy that reads a number on the host."""

    def weighting(self, student_logits: Tensor, teacher_outputs: list[Any], target: Tensor) -> str:
        assert float(student_logits.sum()) == float(student_logits.sum())
        return "uniform"


@pytest.fixture
def reading() -> Iterator[str]:
    kind = type("Registered", (Reading,), {"name": "reading"})
    strategies.register(kind)
    yield "reading"
    strategies.unregister("reading")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_cannot_be_recorded_runs_eagerly_and_says_why(
    dtype: str, reading: str, caplog: pytest.LogCaptureFixture
) -> None:
    precision = PrecisionConfig(compile="off", dtype=dtype)  # type: ignore[arg-type]
    step, recorder = graph_step(reading, precision=precision)
    eager = train_step(reading, precision=precision)
    with caplog.at_level(logging.WARNING):
        take(step, WARM_UP + 4)
    take(eager, WARM_UP + 4)
    assert (recorder.recordings, recorder.replays) == (1, 0)
    (said,) = caplog.messages
    assert said.startswith("training steps run without a CUDA graph: ") and "not permitted" in said
    assert torch.equal(parameters(step), parameters(eager))


HIDDEN = {
    "fill value": lambda x: x.masked_fill_(x > 0, x.sum()),
    "index fill": lambda x: x.index_fill(0, torch.zeros(1, dtype=torch.long), x.sum()),
    "mask": lambda x: x[x > 0],
    "mask written": lambda x: x.index_put_((x > 0,), x[:1]),
    "size": lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.long)),
    "selected": lambda x: x.masked_select(x > 0),
    "number": lambda x: torch.add(x, x, alpha=x.sum()),
}


@pytest.mark.parametrize("what", HIDDEN)
def test_the_stand_in_refuses_what_a_gpu_reads_on_the_host(what: str) -> None:
    """The CPU's versions of these read nothing that a dispatch mode sees."""
    with pytest.raises(RuntimeError, match="not permitted"):
        RecordedGraphs().record(lambda: HIDDEN[what](torch.arange(4.0)))


class FakeCaptures:
    """Stands for torch.cuda's captures. One that fails fails at its end too, and leaves its stream the current one."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.current, self.captures = "default", list[str]()
        patch.setattr(torch.cuda, "Stream", lambda device: "capture")
        patch.setattr(torch.cuda, "CUDAGraph", type("Graph", (), {"replay": lambda graph: None}))
        patch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        patch.setattr(torch.cuda, "set_stream", self.switch)
        patch.setattr(torch.cuda, "graph", self.graph)

    def switch(self, stream: str) -> None:
        self.current = stream

    @contextlib.contextmanager
    def graph(self, graph: object, stream: str, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        before, self.current = self.current, stream
        try:
            yield
        except RuntimeError:
            self.captures.append("failed")
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture") from None
        self.captures.append("ended")
        self.current = before


def test_a_capture_that_fails_is_cleaned_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream is restored, and a capture that succeeds gives the default generator back."""
    cuda = FakeCaptures(monkeypatch)
    recorder = CudaRecorder(CPU)

    def reads_a_number() -> None:
        assert cuda.current == "capture"
        raise RuntimeError("operation not permitted when stream is capturing\nDevice-side assertions: none")

    graph = StepGraph(recorder, CPU, lambda inputs: None)
    graph._record(reads_a_number)
    assert graph.refusal == "operation not permitted when stream is capturing"
    assert cuda.captures == ["failed", "ended"] and cuda.current == "default" and len(recorder._failed) == 1
    recorder.record(lambda: None)()
    assert cuda.captures == ["failed", "ended", "ended"] and len(recorder._failed) == 1


def test_only_inputs_are_copied() -> None:
    """What the work reads lies where it was recorded, whatever the caller passes."""
    seen: list[tuple[int, ...]] = []
    total = torch.zeros(())
    graphs = RecordedGraphs()

    def work(inputs: Any) -> None:
        seen.append(tuple(tensor.data_ptr() for tensor in inputs))
        total.add_(inputs[0].sum() * inputs[1])

    graph = StepGraph(graphs, CPU, work)
    expected, given = 0.0, []
    for i in range(WARM_UP + 3):
        images, factor = torch.full((2, 2), float(i)), torch.tensor(2.0 + i)
        expected += 4.0 * i * (2.0 + i)
        given.append((images, factor))
        graph([images, factor])
    assert total.item() == expected
    assert [(images[0, 0], factor) for images, factor in given] == [(i, 2.0 + i) for i in range(WARM_UP + 3)]
    assert len(seen) == WARM_UP + 1 and graphs.replays == 3  # the recording itself adds nothing


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_a_teacher_cache_in_memory_and_on_disk(limit: int, tmp_path: Path) -> None:
    """Row numbers of a resident cache, or the rows of one that is memory-mapped, travel with the labels."""
    cache = build_cache(tmp_path, make_teachers(), memory_limit=limit)
    assert cache.resident == (limit > 0)

    def trained(recorder: RecordedGraphs | None) -> TrainStep:
        given = CachedTeachers(cache, make_teachers().heads)
        torch.manual_seed(0)
        strategy = strategies.create("ca-mkd", given, 5)
        step = TrainStep(Tiny(5), strategy, given, OPTIM, EAGER, ONE, 8, 0, recorder)
        number = 0
        for epoch in range(3):
            loader = FakeLoader()
            loader.set_epoch(epoch)
            for one, following in with_following(loader, step.looks_ahead):
                step(one, len(one.target), 0.01, number, following)
                number += 1
        return step

    recorder = RecordedGraphs()
    step, eager = trained(recorder), trained(None)
    assert not step.looks_ahead
    assert (recorder.recordings, recorder.replays) == (1, 3 * 6 - WARM_UP)  # the seventh batch has 2 images
    assert_same(step, eager)


class NotReplayed(RecordedGraphs):
    """Only what surrounds the replay runs."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        super().record(work)
        return lambda: None


@pytest.mark.parametrize("name", ["ce", "ca-mkd"])
def test_around_a_replay_there_are_only_copies_of_its_inputs(name: str) -> None:
    """Images, labels and numbers to the record, and the record to the device."""
    step, _ = graph_step(name, NotReplayed())
    take(step, WARM_UP + 1)
    one, other, last = batches(3)
    step(one, 32, 0.1, 9, other)
    with Operations() as operations:
        step(other, 32, 0.1, 10, last)
    assert operations.counts == {"aten::copy_": 3 + 1, "aten::lift_fresh": 1}


def test_teachers_that_run_ahead_add_one_operation() -> None:
    counts = []
    for ahead in ("off", "on"):
        step, recorder = graph_step(precision=replace(EAGER, teacher_ahead=ahead))
        take(step, WARM_UP + 1)
        counts.append(recorder.operations)
    assert counts[1] - counts[0] == 1  # the copy of the next batch to where the student reads it


@pytest.mark.parametrize("deferred", [False, True])
def test_a_run_with_graphs_is_the_run_without(deferred: bool, tmp_path: Path) -> None:
    step, recorder = graph_step()
    runs = trainer(tmp_path / "a", step), trainer(tmp_path / "b")
    runs[0].train = ResidentLoader(images(150), replace(runs[0].train.config, deferred=deferred))
    for run in runs:
        run.run(NullJournal())
    assert recorder.replays > 3 and recorder.recordings == 1
    assert relative(parameters(runs[0].step), parameters(runs[1].step)) < 1e-4


def test_another_loader_is_recorded_anew() -> None:
    """Batches of two loaders with pixels of their own, finished inside the step."""
    step, recorder = graph_step()
    eager = train_step()
    config = LoaderConfig(32, augmentation=Augmentation(padding=1), deferred=True)
    for i in (step, eager):
        number = 0
        for seed in (1, 2):
            for data in ResidentLoader(images(32 * (WARM_UP + 3), seed=seed), config):
                i(data, 32, 0.01, number)
                number += 1
    assert (recorder.recordings, recorder.replays) == (2, 6)
    assert_same(step, eager)


def test_several_processes_run_eagerly_and_say_why(caplog: pytest.LogCaptureFixture) -> None:
    two = World(0, 2, torch.device("cuda"))
    with caplog.at_level(logging.WARNING):
        assert recorder_for(PrecisionConfig(), two) is None
    assert caplog.messages == ["training steps run without a CUDA graph: 2 processes exchange gradients"]
    assert recorder_for(PrecisionConfig(cuda_graphs="off"), two) is None and len(caplog.messages) == 1


def test_settings() -> None:
    with pytest.raises(ValueError, match="cuda_graphs needs a GPU, but the device is cpu"):
        train_step(precision=PrecisionConfig(cuda_graphs="on"))
    assert train_step(precision=EAGER)._graph is None
    for old, new in ((True, "on"), (False, "off"), ("auto", "auto")):  # earlier versions wrote true and false
        assert build(PrecisionConfig, {"cuda_graphs": old}).cuda_graphs == new
    with pytest.raises(ValueError, match="cuda_graphs must be 'auto', 'on', 'off', got 3"):
        build(PrecisionConfig, {"cuda_graphs": 3})
