"""`--resume` with another number of epochs: the uninterrupted run where rates allow it, otherwise only on request."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from camkd_fast.models.model_file import MODEL
from camkd_fast.train import run
from camkd_fast.train.config import DataConfig, DistillConfig, LogConfig, OptimConfig, TeachConfig
from camkd_fast.train.config_file import load
from camkd_fast.train.journal import METRICS, read_metrics
from camkd_fast.train.run import teach
from camkd_fast.train.run_folder import CONFIG, RunExistsError, check_extension, is_finished
from camkd_fast.train.schedule import RateChange, last_change

pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("one_thread")

SLOW = pytest.mark.slow
DATA = DataConfig(images=40)  # 3 steps of 16 images per epoch, of which the last one has 8
LOG = LogConfig(tensorboard=False, progress=False, log_every=1, checkpoint_every=1)
TIMES = ("images_per_second", "start_seconds", "seconds")


def config(out: Path, epochs: int, seed: int = 0, **optim: Any) -> TeachConfig:
    settings = {"batch_size": 16, "schedule": "constant", **optim}
    return TeachConfig("resnet8", seed, out, data=DATA, optim=OptimConfig(epochs=epochs, **settings), log=LOG)


def records(out: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(out / METRICS)]


class Killed(BaseException):
    pass


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """End the run right after the checkpoint of a step."""
    save = run.Checkpoints.save

    def last(self: run.Checkpoints, number: int, *rest: Any) -> Path:
        path = save(self, number, *rest)
        if number == step:
            raise Killed
        return path

    monkeypatch.setattr(run.Checkpoints, "save", last)


SCHEDULES = {
    "constant": {},
    "warm-up": {"warmup": 1.5},
    "step at epochs": {"schedule": "step", "milestones": (1.0, 3.0)},
}


@pytest.mark.parametrize(
    "schedule", ["constant", *(pytest.param(name, marks=SLOW) for name in ("warm-up", "step at epochs"))]
)
def test_a_finished_run_goes_on_as_if_it_had_been_longer(tmp_path: Path, schedule: str) -> None:
    optim = SCHEDULES[schedule]
    whole, out = tmp_path / "whole", tmp_path / "run"
    teach(config(whole, 4, **optim))
    teach(config(out, 2, **optim))
    first = (out / MODEL).read_bytes()
    (out / "report.html").touch()
    result = teach(config(out, 4, **optim), resume=True)
    assert (out / MODEL).read_bytes() == (whole / MODEL).read_bytes() != first
    assert records(out) == records(whole) and not (out / "report.html").exists()
    assert load(out / CONFIG).optim.epochs == 4 and result == teach(config(out, 4, **optim), resume=True)


@pytest.mark.parametrize(
    ("before", "stop", "after"),
    [(2, 4, 3), (4, 5, 2), *(pytest.param(*case, marks=SLOW) for case in ((2, 2, 3), (3, 6, 2)))],
)
def test_an_interrupted_run_goes_on_to_more_or_fewer_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int, stop: int, after: int
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    teach(config(whole, after))
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        with pytest.raises(Killed):
            teach(config(out, before))
    teach(config(out, after), resume=True)
    assert (out / MODEL).read_bytes() == (whole / MODEL).read_bytes() and records(out) == records(whole)


def test_a_step_schedule_goes_on_before_its_first_drop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optim = {"schedule": "step", "milestones": (0.5,)}
    teach(config(tmp_path / "whole", 4, **optim))
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Killed):
            teach(config(tmp_path / "run", 2, **optim))
    teach(config(tmp_path / "run", 4, **optim), resume=True)
    assert (tmp_path / "run" / MODEL).read_bytes() == (tmp_path / "whole" / MODEL).read_bytes()


DEPENDENT = {
    "cosine": ({"schedule": "cosine"}, "step 6 of .* had the learning rate 0.003349 of 2 epochs, not the 0.03147 of 4"),
    "step": ({"schedule": "step", "milestones": (0.5,)}, "step 6 of .* rate 0.005 of 2 epochs, not the 0.05 of 4"),
    "default step": ({"schedule": "step"}, "step 6 of .* had the learning rate 0.0005 of 2 epochs, not the 0.05 of 4"),
}


@pytest.mark.parametrize("schedule", ["cosine", "step", pytest.param("default step", marks=SLOW)])
def test_a_schedule_that_depends_on_the_epochs_takes_extend(tmp_path: Path, schedule: str) -> None:
    optim, words = DEPENDENT[schedule]
    out = tmp_path / "run"
    teach(config(out, 2, **optim))
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    with pytest.raises(RunExistsError, match=f"{words} epochs; --extend goes on with step 7 at 0.0"):
        teach(config(out, 4, **optim), resume=True)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    with pytest.warns(UserWarning, match=words):
        teach(config(out, 4, **optim), resume=True, extend=True)
    (note,) = read_metrics(out / METRICS, "extended")
    assert note == {"kind": "extended", "step": 6, "epoch": 2, "epochs": 4, "epochs_before": 2}
    assert is_finished(out) and [r["epoch"] for r in read_metrics(out / METRICS, "epoch")] == [1, 2, 3, 4]


def test_fewer_epochs_than_trained_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teach(config(tmp_path / "done", 2))
    model = (tmp_path / "done" / MODEL).read_bytes()
    with pytest.raises(RunExistsError, match="has trained 2 epochs, more than the 1 of --epochs: resume it with more"):
        teach(config(tmp_path / "done", 1), resume=True)
    assert (tmp_path / "done" / MODEL).read_bytes() == model
    stop_after(monkeypatch, 4)
    with pytest.raises(Killed):
        teach(config(tmp_path / "stopped", 2))
    with pytest.raises(RunExistsError, match=r"has trained 1.333 epochs, more than the 1 of --epochs"):
        teach(config(tmp_path / "stopped", 1), resume=True, extend=True)


def test_a_run_without_steps_left_announces_none(tmp_path: Path) -> None:
    """2 of 4 epochs of 3 steps are trained, and 2 are asked for."""
    new = config(tmp_path, 2, schedule="cosine")
    with pytest.raises(RunExistsError, match=r"of 2 epochs; --extend ends the run here$"):
        check_extension(new, 4, 6, 3, 1.0, extend=False)
    with pytest.warns(UserWarning, match=r"of 2 epochs; the run ends here$"):
        assert check_extension(new, 4, 6, 3, 1.0, extend=True)
    with pytest.raises(RunExistsError, match=r"of 2 epochs; --extend goes on with step 6 at [\d.]+$"):
        check_extension(new, 4, 5, 3, 1.0, extend=False)


def test_other_settings_are_refused_as_before(tmp_path: Path) -> None:
    out = tmp_path / "run"
    teach(config(out, 1))
    with pytest.raises(RunExistsError, match=r"seed 0 instead of 1, optim.epochs 1 instead of 2: --resume with"):
        teach(config(out, 2, seed=1), resume=True)
    with pytest.raises(RunExistsError, match=r"optim.schedule 'constant' instead of 'cosine'"):
        teach(config(out, 2, schedule="cosine"), resume=True, extend=True)
    with pytest.raises(ValueError, match="extend needs resume"):
        teach(config(out, 2), extend=True)
    shutil.rmtree(out / "checkpoints")
    with pytest.raises(RunExistsError, match="has no checkpoint from which to go on: --overwrite starts again"):
        teach(config(out, 2), resume=True)
    assert is_finished(out)


def test_killed_between_the_two_files_an_extension_is_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    teach(config(whole, 2))
    teach(config(out, 1))

    def killed(*arguments: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(run.run_folder.config_file, "save", killed)
        with pytest.raises(Killed):
            teach(config(out, 2), resume=True)
    assert not is_finished(out)
    teach(config(out, 2), resume=True)
    assert (out / MODEL).read_bytes() == (whole / MODEL).read_bytes()


def test_a_student_goes_on_too(tmp_path: Path) -> None:
    teach(config(tmp_path / "t", 1))

    def student(name: str, epochs: int) -> DistillConfig:
        optim = OptimConfig(epochs=epochs, batch_size=16, schedule="constant")
        data = replace(DATA, views=2)
        return DistillConfig(
            "resnet8", (tmp_path / "t",), "ca-mkd", out=tmp_path / name, data=data, optim=optim, log=LOG,
            teacher_cache=tmp_path / name,  # in the run's own folder, which it has locked
        )  # fmt: skip

    run.distill(student("whole", 3))
    run.distill(student("run", 1))
    run.distill(student("run", 3), resume=True)
    assert (tmp_path / "run" / MODEL).read_bytes() == (tmp_path / "whole" / MODEL).read_bytes()


def test_the_last_differing_step_is_found() -> None:
    old = OptimConfig(epochs=10, milestones=(0.5, 0.9))
    assert last_change(old, replace(old, epochs=20), 1.0, 49, 10) is None
    assert last_change(old, replace(old, epochs=20), 1.0, 51, 10) == RateChange(50, 0.1, 1.0)
    assert last_change(old, replace(old, epochs=11), 1.0, 57, 10) == RateChange(54, 0.1, 1.0)
    absolute = replace(old, milestones=(5, 9))
    assert last_change(absolute, replace(absolute, epochs=1000), 1.0, 100, 10) is None
    assert last_change(old, absolute, 1.0, 100, 10) is None
