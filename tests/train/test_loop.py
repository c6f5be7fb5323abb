"""The training loop: records, steps and checkpoints, validation, divergence."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from camkd_fast.train import trainer as trainer_module
from camkd_fast.train.checkpoint import Checkpoints
from camkd_fast.train.config import LogConfig, OptimConfig
from camkd_fast.train.journal import NullJournal
from camkd_fast.train.step import TrainStep
from camkd_fast.train.sums import NonFiniteLossError, NonFiniteTeachersError
from camkd_fast.train.trainer import Clock
from camkd_fast.train.trainer import evaluate as evaluate_model
from tests.support.training import ONE, SmallNet, images, loader, train_step, trainer

QUIET = LogConfig(tensorboard=False, progress=False)


pytestmark = pytest.mark.usefixtures("one_thread")


class Recorder(NullJournal):
    """A journal that keeps its records in memory."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def write(self, record: Any) -> None:
        self.records.append(json.loads(json.dumps(record, allow_nan=False)))

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == kind]


# --- epochs ----------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_says_so(tmp_path: Path) -> None:
    journal = Recorder()
    run = trainer(tmp_path, log=replace(QUIET, log_every=2))
    outcome = run.run(journal)
    epochs, steps = journal.of("epoch"), journal.of("steps")
    assert [r["epoch"] for r in epochs] == [1, 2, 3]
    assert [r["step"] for r in epochs] == [5, 10, 15]  # 150 images in steps of 32
    assert [r["step"] for r in steps] == [2, 4, 6, 8, 12, 14]  # an epoch's last step is in its own record
    assert epochs[-1]["loss"] < epochs[0]["loss"]
    for record in journal.records:
        assert record["loss"] == pytest.approx(record["hard"] + record["soft"] + record["feature"], rel=1e-4)
        assert len(record["weights"]) == len(record["feature_weights"]) == 2
        assert sum(record["weights"]) == pytest.approx(1, rel=1e-4)
        assert 0 <= record["train_accuracy"] <= 1
    assert [r["learning_rate"] for r in epochs] == pytest.approx([0.02, 0.02, 0.00002])
    assert outcome.images_per_second > 0 and outcome.start_seconds > 0


def test_records_are_means_over_the_images_they_cover(tmp_path: Path) -> None:
    journal = Recorder()
    optim = OptimConfig(epochs=1, batch_size=32)
    trainer(tmp_path, train_step("ce"), optim=optim, log=replace(QUIET, log_every=1)).run(journal)
    steps, (epoch,) = journal.of("steps"), journal.of("epoch")
    # Steps of 32, 32, 32, 32 and 22 images; the last one has no record of its own.
    known = sum(32 * record["loss"] for record in steps)
    last = (150 * epoch["loss"] - known) / 22
    assert len(steps) == 4 and 0 < last < 2 * max(record["loss"] for record in steps)
    assert (150 * epoch["train_accuracy"]) == pytest.approx(round(150 * epoch["train_accuracy"]))


def test_every_image_is_trained_on_once_per_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, train_step("ce"))
    seen: list[Tensor] = []
    take = TrainStep.__call__

    def watch(step: TrainStep, batch: Any, items: int, rate: float, number: int, following: Any) -> None:
        seen.append(batch.index)
        assert items == len(batch.index) and number == len(seen) - 1
        take(step, batch, items, rate, number, following)

    monkeypatch.setattr(TrainStep, "__call__", watch)
    run.run(NullJournal())
    for epoch in range(3):
        order = torch.cat(seen[5 * epoch : 5 * epoch + 5])
        assert torch.equal(order.sort().values, torch.arange(150))
    assert not torch.equal(torch.cat(seen[:5]), torch.cat(seen[5:10]))


def test_each_step_has_the_rate_of_its_own_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    take = TrainStep.__call__

    def watch(step: TrainStep, batch: Any, items: int, rate: float, number: int, following: Any) -> None:
        rates.append(rate)
        take(step, batch, items, rate, number, following)

    monkeypatch.setattr(TrainStep, "__call__", watch)
    optim = OptimConfig(epochs=2, batch_size=32, warmup=0.6, milestones=(0.5, 0.8), drop=0.1)
    trainer(tmp_path, train_step("ce"), optim=optim).run(NullJournal())
    # 10 steps: 3 of warmup to the peak of 0.02, drops before the sixth and the ninth.
    assert rates == pytest.approx([0.02 / 3, 0.04 / 3, *[0.02] * 3, *[0.002] * 3, *[0.0002] * 2])


@pytest.mark.parametrize(
    ("every", "expected"), [(0, [5, 10]), (1, [*range(1, 11)]), (2, [2, 4, 5, 6, 8, 10]), (3, [3, 5, 6, 9, 10])]
)
def test_checkpoints_are_of_these_steps_and_of_every_epochs_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, expected: list[int]
) -> None:
    saved: list[int] = []
    monkeypatch.setattr(Checkpoints, "save", lambda checkpoints, step, model, state: saved.append(step))
    log = replace(QUIET, checkpoint_every=every)
    trainer(tmp_path, train_step("ce"), optim=OptimConfig(epochs=2, batch_size=32), log=log).run(NullJournal())
    assert saved == expected


def test_every_validation_is_of_the_exchanged_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch norm's statistics differ between ranks; only rank 0's are saved."""
    calls: list[str] = []
    evaluated = trainer_module.evaluate

    def evaluate(*arguments: Any) -> Any:
        calls.append("evaluate")
        return evaluated(*arguments)

    monkeypatch.setattr(trainer_module.World, "copy_buffers", lambda world, module: calls.append("copy"))
    monkeypatch.setattr(trainer_module, "evaluate", evaluate)
    trainer(tmp_path, train_step("ce")).run(NullJournal())
    assert calls == ["copy", "evaluate"] * 3


@pytest.mark.parametrize(("every", "expected"), [(1, [1, 2, 3]), (2, [2, 3]), (5, [3])])
def test_validation_every_few_epochs_and_after_the_last(tmp_path: Path, every: int, expected: list[int]) -> None:
    journal = Recorder()
    trainer(tmp_path, train_step("ce"), log=replace(QUIET, validate_every=every)).run(journal)
    assert [r["epoch"] for r in journal.of("epoch") if "validation_accuracy" in r] == expected


def test_evaluation_counts_every_image_and_leaves_no_trace() -> None:
    data = images(131)
    model = SmallNet(batch_norm=True, dropout=0.5).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = evaluate_model(model, loader(data, 32, train=False), ONE)
    assert not model.training and result.images == 131
    logits = model(data.normalise(data.pixels))
    assert result.accuracy == pytest.approx((logits.argmax(1) == data.labels).double().mean().item())
    assert result.loss == pytest.approx(nn.functional.cross_entropy(logits, data.labels).item(), rel=1e-5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_clock_separates_first_steps_and_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    clock = Clock(torch.device("cpu"), first=2)
    clock.go()
    now += 1
    clock.count(64)
    clock.pause()
    now += 50  # an evaluation
    clock.go()
    now += 4
    clock.count(64)
    assert (clock.start_seconds, clock.seconds, clock.images) == (5, 0, 0)
    for _ in range(3):
        now += 2
        clock.count(10)
    clock.pause()
    assert clock.images_per_second == clock.lap() == 5
    clock.go()
    now += 1
    clock.count(10)
    clock.pause()
    assert clock.lap() == 10 and clock.seconds == 7 and clock.start_seconds == 5


# --- divergence ------------------------------------------------------------------------------------------------------


class _Explodes(SmallNet):
    """Its logits are NaN in one training call."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self.call, self.calls = call, 0

    def forward_head(self, features: Tensor) -> Tensor:
        self.calls += self.training
        return super().forward_head(features) * (math.nan if self.training and self.calls == self.call else 1.0)


@pytest.mark.parametrize("log_every", [1, 3, 50])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, log_every: int) -> None:
    journal = Recorder()
    log = replace(QUIET, log_every=log_every, checkpoint_every=2)
    run = trainer(tmp_path, train_step("ca-mkd", student=_Explodes(8)), log=log)
    words = r"step 8: loss nan, hard nan, soft nan, feature \d\S+; learning rate 0.02; last good .*: .*/step-00000006$"
    with pytest.raises(NonFiniteLossError, match=words):
        run.run(journal)
    assert max(path.name for path in run.checkpoints.paths()) == "step-00000006"
    assert all(math.isfinite(record["loss"]) for record in journal.records)
    assert all(t.isfinite().all() for t in run.checkpoints.latest().model.values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("strategy", ["aver", "ebkd", "ca-mkd"])
def test_a_teacher_that_is_not_finite_is_the_reason_that_is_given(tmp_path: Path, strategy: str, value: float) -> None:
    """The student has not diverged, so a lower learning rate would not help."""
    step = train_step(strategy)
    step.teachers._modules[1].fc.bias.data.fill_(value)
    run = trainer(tmp_path, step, log=replace(QUIET, log_every=1))
    words = r"step 1: loss nan, hard \d\S+, soft nan, .*; the student's part is finite, so a teacher gives NaN or inf"
    with pytest.raises(NonFiniteTeachersError, match=words + r".*; learning rate 0.02; last good checkpoint: none$"):
        run.run(NullJournal())


def test_a_student_with_an_infinite_logit_is_no_fault_of_the_teachers(tmp_path: Path) -> None:
    """Off the label: its cross-entropy is finite."""
    step = train_step("aver")
    step.student.fc.bias.data[9] = -math.inf
    run = trainer(tmp_path, step, log=replace(QUIET, log_every=1))
    with pytest.raises(NonFiniteLossError, match="soft inf") as caught:
        run.run(NullJournal())
    assert not isinstance(caught.value, NonFiniteTeachersError)


def test_a_parameter_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    # The last step of an epoch may make a parameter NaN although its loss was finite.
    run = trainer(tmp_path, train_step("ce"))
    inner = run.step.optimizer.step

    def break_last(*args: Any, **kwargs: Any) -> None:
        inner(*args, **kwargs)
        if run.position == 4:
            run.step.student.fc.bias.data[0] = math.inf

    run.step.optimizer.step = break_last
    run.validation = None
    with pytest.raises(NonFiniteLossError, match=r"a parameter is not finite after step 5; .* checkpoint: none"):
        run.run(NullJournal())
    assert not run.checkpoints.paths()
