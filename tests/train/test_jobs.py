"""teach, distill and evaluate on digits: results, the run folder, bad input."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from camkd_fast.models.model_file import CheckpointError
from camkd_fast.train import config_file, run, trainer
from camkd_fast.train.config import DataConfig, DistillConfig, LogConfig, OptimConfig, PrecisionConfig, TeachConfig
from camkd_fast.train.journal import METRICS, read_metrics
from camkd_fast.train.run import RunResult, distill, evaluate, teach
from camkd_fast.train.run_folder import RunExistsError, load_model, model_metadata
from camkd_fast.train.run_images import training_augmentation
from camkd_fast.train.sums import NonFiniteLossError
from camkd_fast.train.teachers.cache import CacheError
from camkd_fast.train.teachers.live import LiveTeachers

QUIET = LogConfig(tensorboard=False, progress=False)


pytestmark = pytest.mark.usefixtures("one_thread")


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

    monkeypatch.setattr(LiveTeachers, "outputs", refuse)
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


def test_a_run_of_an_earlier_version_ends_the_same(tmp_path: Path, teachers: tuple[Path, ...]) -> None:
    """Its config has run folders as teachers, and neither a class map nor initial weights."""
    config = DistillConfig("resnet8", teachers, strategy="aver", out=tmp_path / "s", data=FEW, optim=SHORT, log=QUIET)
    model, file = config.out / "model.safetensors", config.out / "config.yaml"
    distill(config)
    expected = model.read_bytes()
    model.unlink()
    shutil.rmtree(max((config.out / "checkpoints").iterdir()))
    written = yaml.safe_load(file.read_text())
    assert written["teachers"] == [str(path) for path in teachers]
    file.write_text(
        yaml.safe_dump({name: value for name, value in written.items() if name not in ("class_map", "init")})
    )
    distill(config, resume=True)
    assert model.read_bytes() == expected


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write the (run )?folder .*file/run: Not a directory"):
        teach(teach_config(tmp_path / "file" / "run"))


def test_a_finished_run_without_its_result_is_named(tmp_path: Path) -> None:
    """As a loss of power may leave it."""
    config = teach_config(tmp_path / "run", optim=replace(SHORT, epochs=1))
    teach(config)
    path = config.out / METRICS
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match=r"metrics.jsonl is damaged: it has no record of the test images"):
        teach(config, resume=True)


def test_a_run_leaves_how_the_caller_wants_to_hear_of_other_algorithms(tmp_path: Path) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        teach(teach_config(tmp_path, optim=replace(SHORT, epochs=1)))
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(before)


def test_an_average_that_diverges_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trainer.evaluate_average
    averaged = teach_config(tmp_path, optim=replace(SHORT, epochs=1, ema=0.9))

    def diverged(*given: Any) -> Any:
        return whole(*given)._replace(loss=math.inf)

    monkeypatch.setattr(run, "evaluate_average", diverged)
    with pytest.raises(NonFiniteLossError, match="the test loss of the average is inf after step 4"):
        teach(averaged)
    monkeypatch.setattr(trainer, "evaluate_average", diverged)
    with pytest.raises(NonFiniteLossError, match="the validation loss of the average is inf after step 4"):
        teach(averaged, overwrite=True)


def test_last_steps_that_diverge_leave_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen on the test images, where none are held out."""
    whole = run.evaluate_model
    monkeypatch.setattr(run, "evaluate_model", lambda *given: whole(*given)._replace(loss=math.nan))
    with pytest.raises(NonFiniteLossError, match="the test loss is nan after step"):
        teach(teach_config(tmp_path))
    assert not (tmp_path / "model.safetensors").exists()


def test_invalid_teachers_are_refused(tmp_path: Path, teachers: tuple[Path, ...]) -> None:
    def attempt(*teachers: Path, **changes: Any) -> None:
        base = DistillConfig(student="resnet8", teachers=teachers, out=tmp_path / "s", data=FEW, optim=SHORT, log=QUIET)
        distill(replace(base, **changes))

    with pytest.raises(ValueError, match="ca-mkd learns from teachers, but none were given"):
        attempt()
    with pytest.raises(ValueError, match=r"nowhere does not exist: expected a run folder, NAME@FILE"):
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
    for read in (attempt, load_model):
        with pytest.raises(CheckpointError, match="does not fit resnet8"):
            read(other)
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
