"""The training loop and the run folder: records, divergence, evaluation, checks of the folder."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from camkd_fast.train import config_file
from camkd_fast.train import trainer as trainer_module
from camkd_fast.train.checkpoint import CheckpointError, Checkpoints
from camkd_fast.train.config import DataConfig, DistillConfig, LogConfig, OptimConfig, PrecisionConfig, TeachConfig
from camkd_fast.train.journal import METRICS, NullJournal, read_metrics
from camkd_fast.train.run import RunResult, distill, evaluate, teach, training_augmentation
from camkd_fast.train.run_folder import RunExistsError, load_model, model_metadata
from camkd_fast.train.step import TrainStep
from camkd_fast.train.sums import NonFiniteLossError
from camkd_fast.train.teachers.cache import CacheError
from camkd_fast.train.teachers.live import LiveTeachers
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

    def watch(step: TrainStep, batch: Any, items: int, rate: float, number: int) -> None:
        seen.append(batch.index)
        assert items == len(batch.index) and number == len(seen) - 1
        take(step, batch, items, rate, number)

    monkeypatch.setattr(TrainStep, "__call__", watch)
    run.run(NullJournal())
    for epoch in range(3):
        order = torch.cat(seen[5 * epoch : 5 * epoch + 5])
        assert torch.equal(order.sort().values, torch.arange(150))
    assert not torch.equal(torch.cat(seen[:5]), torch.cat(seen[5:10]))


def test_each_step_has_the_rate_of_its_own_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    take = TrainStep.__call__

    def watch(step: TrainStep, batch: Any, items: int, rate: float, number: int) -> None:
        rates.append(rate)
        take(step, batch, items, rate, number)

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


# --- jobs on digits --------------------------------------------------------------------------------------------------

pytest.importorskip("sklearn")
SHORT = OptimConfig(epochs=2, batch_size=50)
FEW = DataConfig(images=200)


def teach_config(out: Path, **changes: Any) -> TeachConfig:
    return replace(TeachConfig(model="resnet8", out=out, data=FEW, optim=SHORT, log=QUIET), **changes)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """Two teachers of digits, in one folder."""
    folder = tmp_path_factory.mktemp("teachers")
    for seed in range(2):
        teach(teach_config(folder / str(seed), seed=seed, optim=replace(SHORT, epochs=8)))
    return folder / "0", folder / "1"


def test_teach_leaves_a_run_that_can_be_evaluated(tmp_path: Path) -> None:
    config = teach_config(tmp_path / "run", log=LogConfig(progress=False, log_every=3), optim=replace(SHORT, epochs=8))
    result = teach(config)
    out = config.out
    assert {path.name for path in out.iterdir()} == {
        *("config.yaml", METRICS, "model.safetensors", "checkpoints", "tensorboard")
    }
    assert config_file.load(out / "config.yaml") == config
    assert result.test.images == 597 and result.test.accuracy > 0.3
    assert evaluate(out, "test") == pytest.approx(result.test)
    (record,) = read_metrics(out / METRICS, "test")
    assert record["test_accuracy"] == result.test.accuracy and record["step"] == 8 * 4
    last = read_metrics(out / METRICS, "epoch")[-1]
    assert evaluate(out, "validation").accuracy == last["validation_accuracy"]
    assert evaluate(out, "train").images == 900
    metadata = model_metadata(out)
    assert metadata["model"] == "resnet8" and metadata["num_classes"] == 10 and metadata["in_channels"] == 1
    assert metadata["data"] == "digits" and metadata["size"] == [8, 8] and len(metadata["mean"]) == 1
    with pytest.raises(ValueError, match=r"split must be one of train, validation, test, got 'tset'"):
        evaluate(out, "tset")


@pytest.mark.parametrize("strategy", ["ce", "kd", "aekd", "fitnet-mkd", "ca-mkd"])
def test_distill_by_any_strategy(tmp_path: Path, teachers: tuple[Path, ...], strategy: str) -> None:
    config = DistillConfig(
        student="resnet8", teachers=teachers, strategy=strategy, out=tmp_path / "s", data=FEW, optim=SHORT, log=QUIET
    )
    result = distill(config)
    (last,) = read_metrics(result.out / METRICS, "epoch")[-1:]
    assert len(last["weights"]) == (0 if strategy == "ce" else 2)
    assert (last["feature"] > 0) == (strategy in ("fitnet-mkd", "ca-mkd"))


def test_a_teacher_cache_changes_nothing_but_who_is_asked(
    tmp_path: Path, teachers: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = DistillConfig(
        student="resnet8",
        teachers=teachers,
        strategy="ca-mkd-logits",
        data=replace(FEW, views=2),
        optim=SHORT,
        log=QUIET,
    )

    def model(name: str, **changes: Any) -> bytes:
        return (distill(replace(base, out=tmp_path / name, **changes)).out / "model.safetensors").read_bytes()

    live = model("live")
    cached = model("cached", teacher_cache=tmp_path / "cache")
    assert live == cached

    def refuse(*arguments: object) -> None:
        raise AssertionError("a teacher was asked")

    monkeypatch.setattr(LiveTeachers, "__call__", refuse)
    assert model("replayed", teacher_cache=tmp_path / "cache") == live
    with pytest.raises(AssertionError, match="a teacher was asked"):
        model("asks")
    with pytest.raises(CacheError, match="seed"):
        model("stale", teacher_cache=tmp_path / "cache", seed=1)
    with pytest.raises(CacheError, match="feature"):
        model("features", teacher_cache=tmp_path / "cache", strategy="ca-mkd")


def test_same_seed_same_bytes_and_the_callers_random_numbers_stay(tmp_path: Path) -> None:
    def model(name: str, **changes: Any) -> bytes:
        return (teach(teach_config(tmp_path / name, **changes)).out / "model.safetensors").read_bytes()

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = model("a")
    assert torch.equal(torch.rand(3), expected)
    assert first == model("b") and first != model("c", seed=1)
    # Wrong labels and logging settings: neither changes the file's size, and only the labels change its bytes.
    assert len({first, model("d", wrong_labels=0.5), model("f", swapped=(0, 1))}) == 3
    assert first == model("e", log=replace(QUIET, log_every=1, checkpoint_every=1, validate_every=2))


def test_other_settings_of_a_step_run(tmp_path: Path, teachers: tuple[Path, ...]) -> None:
    for dtype in ("bfloat16", "float16"):
        precision = PrecisionConfig(dtype=dtype, channels_last=True)  # type: ignore[arg-type]
        config = DistillConfig(
            student="resnet8",
            teachers=teachers,
            out=tmp_path / dtype,
            data=FEW,
            optim=SHORT,
            precision=precision,
            log=QUIET,
        )
        assert math.isfinite(distill(config).test.loss)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_a_run_is_not_overwritten_by_accident(tmp_path: Path) -> None:
    config = teach_config(tmp_path / "run")
    first = teach(config)
    with pytest.raises(RunExistsError, match="holds a finished run"):
        teach(config)
    again = teach(config, resume=True)  # already finished
    assert again == first
    with pytest.raises(RunExistsError, match=r"started with seed 0 instead of 1, optim.epochs 2 instead of 3"):
        teach(replace(config, seed=1, optim=replace(SHORT, epochs=3)), resume=True)
    with pytest.raises(ValueError, match="exclude each other"):
        teach(config, resume=True, overwrite=True)
    (config.out / "notes.txt").write_text("mine")
    assert isinstance(teach(replace(config, seed=1), overwrite=True), RunResult)
    assert (config.out / "notes.txt").read_text() == "mine"
    (config.out / "model.safetensors").unlink()
    with pytest.raises(RunExistsError, match="holds an unfinished run"):
        teach(replace(config, seed=1))


def test_resuming_past_a_damaged_checkpoint_ends_the_same(tmp_path: Path) -> None:
    config = teach_config(tmp_path / "run", log=replace(QUIET, checkpoint_every=3))
    model, metrics = config.out / "model.safetensors", config.out / METRICS
    result = teach(config)
    expected, lines = model.read_bytes(), len(read_metrics(metrics))
    model.unlink()
    newest = max((config.out / "checkpoints").iterdir())
    (newest / "state.pt").write_bytes((newest / "state.pt").read_bytes()[:1000])
    with pytest.warns(UserWarning, match=rf"{newest.name}.* is damaged: .*; taking the one before it"):
        again = teach(replace(config, log=QUIET), resume=True)  # logging settings may change
    assert model.read_bytes() == expected and again.test == result.test
    assert len(read_metrics(metrics)) == lines


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write the run folder .*file/run: Not a directory"):
        teach(teach_config(tmp_path / "file" / "run"))


def test_invalid_teachers_are_refused(tmp_path: Path, teachers: tuple[Path, ...]) -> None:
    def attempt(*teachers: Path, **changes: Any) -> None:
        base = DistillConfig(student="resnet8", teachers=teachers, out=tmp_path / "s", data=FEW, optim=SHORT, log=QUIET)
        distill(replace(base, **changes))

    with pytest.raises(ValueError, match="ca-mkd learns from teachers, but none were given"):
        attempt()
    with pytest.raises(FileNotFoundError, match=r"nowhere holds no run"):
        attempt(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no model is called 'resnet9'"):
        attempt(*teachers, student="resnet9")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    content = (teachers[0] / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=r"damaged/model.safetensors is damaged"):
        attempt(damaged)
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes(content.replace(b'num_classes\\": 10,', b'num_classes\\": 99,'))
    with pytest.raises(ValueError, match=r"other has num_classes 99, but the student's images have 10"):
        attempt(other)
    with pytest.raises(CheckpointError, match="does not fit resnet8"):
        load_model(other)
    assert not (tmp_path / "s").exists()


def test_augmentation_by_default() -> None:
    from camkd_fast.data import LabelledImages

    def of(side: int, **settings: Any) -> tuple[str, int, bool]:
        data = LabelledImages(torch.zeros(1, 3, side, side, dtype=torch.uint8), torch.zeros(1), 1, (0.0,), (1.0,))
        made = training_augmentation(DataConfig(**settings), data)
        return made.kind, made.padding, made.flip

    assert of(32, data="cifar100") == ("crop", 4, True)
    assert of(8, data="digits") == ("crop", 1, False)
    assert of(28, data="fashion-mnist", flip=False, padding=2) == ("crop", 2, False)
    assert of(224, data="stanford-dogs") == ("resized-crop", 0, True)
    assert of(32, data="cifar100", augmentation="none") == ("crop", 0, False)
