"""The average of a student: its formula, recorded, resumed and skipped steps, and the files of a run."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from camkd_fast.experiments import run_report
from camkd_fast.models.model_file import AVERAGED_MODEL, MODEL
from camkd_fast.train import run_folder
from camkd_fast.train.average import Average
from camkd_fast.train.config import DataConfig, DistillConfig, LogConfig, OptimConfig, PrecisionConfig, TeachConfig
from camkd_fast.train.export import export
from camkd_fast.train.journal import METRICS, NullJournal, read_metrics
from camkd_fast.train.run import distill, evaluate, teach
from camkd_fast.train.run_folder import load_model
from camkd_fast.train.step import TrainStep
from camkd_fast.train.step_graph import WARM_UP
from tests.support.recorded_graph import RecordedGraphs
from tests.support.training import EAGER, OPTIM, SmallNet, batch, train_step, trainer

pytestmark = pytest.mark.usefixtures("one_thread")
QUIET = LogConfig(tensorboard=False, progress=False)
DECAY = 0.9


def step_with(ema: float | None = DECAY, precision: PrecisionConfig = EAGER, recorder: Any = None) -> TrainStep:
    made = train_step("ca-mkd", student=SmallNet(batch_norm=True))
    optim = replace(OPTIM, ema=ema)
    return TrainStep(made.student, made.strategy, made.teachers, optim, precision, made._world, 32, 0, recorder)


def take(step: TrainStep, count: int, first: int = 0) -> None:
    for i in range(first, first + count):
        step(batch(32, seed=i), 32, 0.01 * (1 + i), i)


def numbers(module: nn.Module) -> Tensor:
    return torch.cat([t.flatten().float() for t in module.state_dict().values()])


def relative(one: Tensor, two: Tensor) -> float:
    return float((one - two).norm() / two.norm())


def test_weights_decay_and_the_first_ones_sooner() -> None:
    module = nn.BatchNorm1d(3)
    average = Average(module, 0.7)
    expected = torch.zeros(3, dtype=torch.float64)
    for t in range(1, 40):
        for values in (module.bias.data, module.running_mean):
            values.copy_(torch.full((3,), float(t % 5)))
        module.num_batches_tracked.fill_(t)
        average.update(t, None)
        weight = max(0.3, 9 / (10 + t))
        expected += weight * (t % 5 - expected)
        for values in (average.module.bias, average.module.running_mean):
            torch.testing.assert_close(values.detach().double(), expected)
        assert average.module.num_batches_tracked == t
    assert not average.module.training and not average.module.bias.requires_grad
    assert torch.equal(average.module.weight, torch.ones(3))


def test_a_step_averages_its_student_and_is_otherwise_the_same() -> None:
    step, without = step_with(), step_with(None)
    twin = Average(without.student, DECAY)
    for i in range(5):
        for made in (step, without):
            take(made, 1, first=i)
        twin.update(float(i + 1), None)
    assert torch.equal(numbers(step.student), numbers(without.student)) and without.average is None
    assert torch.equal(numbers(step.average.module), numbers(twin.module))
    assert relative(numbers(twin.module), numbers(step.student)) > 1e-3


def test_replays_move_the_average() -> None:
    recorder = RecordedGraphs()
    step, eager = step_with(recorder=recorder), step_with()
    for made in (step, eager):
        take(made, WARM_UP + 4)
    assert recorder.replays == 4
    assert relative(numbers(step.average.module), numbers(eager.average.module)) < 1e-6


@pytest.mark.parametrize("recorded", [False, True])
def test_a_skipped_step_does_not_count(recorded: bool) -> None:
    precision = PrecisionConfig(compile="off", dtype="float16")
    step = step_with(precision=precision, recorder=RecordedGraphs() if recorded else None)
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26, growth_interval=2000)
    before, skips = numbers(step.average.module), 0
    for i in range(16):
        scale = step.scaler.get_scale()
        take(step, 1, first=i)
        skipped = step.scaler.get_scale() < scale
        skips += skipped
        after = numbers(step.average.module)
        assert torch.equal(after, before) == skipped
        before = after
    assert 2 < skips < 16 and before.isfinite().all()


def test_the_average_goes_on_to_the_bit() -> None:
    whole, first, second = step_with(), step_with(), step_with()
    take(whole, 6)
    take(first, 3)
    second.student.load_state_dict(first.student.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    take(second, 3, first=3)
    assert torch.equal(numbers(second.average.module), numbers(whole.average.module))
    assert "average" not in step_with(None).state_dict()


def test_it_is_validated_beside_the_student(tmp_path: Path) -> None:
    class Kept(NullJournal):
        def write(self, record: Any) -> None:
            if record["kind"] == "epoch":
                records.append(dict(record))

    records: list[dict[str, Any]] = []
    for ema in (DECAY, None):
        trainer(tmp_path / str(ema), step_with(ema)).run(Kept())
    own = {"ema_validation_accuracy", "ema_validation_loss"}
    with_average, without = records[:3], records[3:]
    for one, other in zip(with_average, without, strict=True):
        assert set(one) - set(other) == own
        assert one["validation_loss"] == other["validation_loss"] != one["ema_validation_loss"]


# --- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an average."""
    pytest.importorskip("sklearn")
    out = tmp_path_factory.mktemp("runs") / "t"
    optim = OptimConfig(epochs=3, batch_size=50, ema=0.5)
    teach(TeachConfig("resnet8", out=out, data=DataConfig(images=200), optim=optim, log=QUIET))
    return out


def test_a_run_writes_both_models_and_their_accuracies(run: Path) -> None:
    (record,) = read_metrics(run / METRICS, "test")
    for file, prefix in ((run, "test"), (run / MODEL, "test"), (run / AVERAGED_MODEL, "ema_test")):
        found = evaluate(file)
        assert (found.images, found.accuracy) == (record[f"{prefix}_images"], record[f"{prefix}_accuracy"])
        assert found.loss == pytest.approx(record[f"{prefix}_loss"])
    assert record["ema_test_loss"] != record["test_loss"]
    again = teach(replace(run_config(run), out=run), resume=True)
    assert again.averaged is not None and again.averaged.accuracy == record["ema_test_accuracy"]


def run_config(run: Path) -> TeachConfig:
    from camkd_fast.train import config_file

    loaded = config_file.load(run / "config.yaml")
    assert isinstance(loaded, TeachConfig)
    return loaded


def test_the_report_has_both(run: Path) -> None:
    epochs, (test,) = (read_metrics(run / METRICS, kind) for kind in ("epoch", "test"))
    section = run_report._result(run_config(run), epochs, test, SimpleNamespace(models=[]))
    figures = section.parts[0].values
    assert figures["test accuracy, average"] == f"{100 * test['ema_test_accuracy']:.2f} %" != figures["test accuracy"]
    run_report._place(epochs, epochs[-1])
    (curve,) = run_report._validated("average", "", epochs, "ema_validation_accuracy")
    assert curve.runs == [[100 * epoch["ema_validation_accuracy"] for epoch in epochs]]
    assert run_report._validated("average", "", [{"epoch": 1}], "ema_validation_accuracy") == []


def test_the_averaged_model_can_be_a_teacher(run: Path, tmp_path: Path) -> None:
    config = DistillConfig(
        "resnet8", (run / AVERAGED_MODEL,), out=tmp_path / "s", data=DataConfig(images=100), log=QUIET
    )
    result = distill(replace(config, optim=OptimConfig(epochs=1, batch_size=50)))
    assert result.averaged is None and not (tmp_path / "s" / AVERAGED_MODEL).exists()


@pytest.mark.slow
def test_the_averaged_model_can_be_exported(run: Path) -> None:
    pytest.importorskip("onnxscript")
    done = export(run / AVERAGED_MODEL)
    assert done.program == run / "export" / "student.pt2"
    images = torch.randn(2, 1, 8, 8)
    logits = torch.export.load(done.program).module()(images)
    with torch.no_grad():
        assert relative(logits, load_model(run / AVERAGED_MODEL)(images)) < 1e-4
        assert relative(logits, load_model(run)(images)) > 1e-3


def test_overwriting_removes_it(run: Path, tmp_path: Path) -> None:
    config = replace(run_config(run), out=tmp_path)
    for name in ("config.yaml", MODEL, AVERAGED_MODEL, METRICS):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    run_folder.prepare(config, resume=False)
    assert not (tmp_path / AVERAGED_MODEL).exists() and not (tmp_path / MODEL).exists()


def test_settings() -> None:
    with pytest.raises(ValueError, match=r"ema must lie in \[0, 1\), got 1.0"):
        OptimConfig(ema=1.0)
