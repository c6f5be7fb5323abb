"""A run folder: its files, checks before writing to it, and loading its model."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..models import model_file
from ..models.model_file import AVERAGED_MODEL, MODEL, read_model
from . import config_file
from .checkpoint import Checkpoints
from .config import JobConfig
from .journal import METRICS
from .schedule import last_change, learning_rate

CONFIG, TEACHERS, REPORT = "config.yaml", "teachers.json", "report.html"
CHECKPOINTS, TENSORBOARD = "checkpoints", "tensorboard"
# What a run writes besides its config; the model is removed first, without which the run counts as unfinished.
_FILES, _FOLDERS = (MODEL, AVERAGED_MODEL, METRICS, REPORT, TEACHERS), (CHECKPOINTS, TENSORBOARD)
# Settings that may differ on resume: locations, logging, launches, and how many files may be unreadable. A name that
# ends with a dot stands for all settings of that group.
FREE = (
    *("out", "teacher_cache", "data.root", "data.workers", "data.skip_bad"),
    *("precision.device", "precision.cuda_graphs", "precision.teacher_ahead", "log."),
)


class RunExistsError(RuntimeError):
    """The folder holds a run, and neither resume nor overwrite applies."""


def is_free(name: str) -> bool:
    """Whether `FREE` has a setting, given by its dotted name, or the group of it."""
    return any(name == free or (free.endswith(".") and name.startswith(free)) for free in FREE)


def is_finished(out: Path) -> bool:
    """Whether a run finished here: the model is the last file that it writes."""
    return (out / MODEL).exists()


def is_done(config: JobConfig) -> bool:
    """Whether a run of these epochs finished in `config.out`."""
    out = config.out
    return is_finished(out) and epochs_before(config) is None


def epochs_before(config: JobConfig) -> int | None:
    """The number of epochs that the run in `config.out` was started for; None without a run, or for that of `config`.

    Raises:
        ValueError, OSError: the config of the existing run cannot be read.
    """
    path = config.out / CONFIG
    epochs = config_file.load(path).optim.epochs if path.exists() else config.optim.epochs
    return None if epochs == config.optim.epochs else epochs


def has_checkpoint(config: JobConfig) -> bool:
    """Whether the run in `config.out` has one, damaged ones included."""
    return (config.out / CONFIG).exists() and any(Checkpoints(config.out / CHECKPOINTS).paths())


def has_trained(out: Path) -> bool:
    """Whether steps of the run in a folder are kept, by its model or a checkpoint."""
    return is_finished(out) or any(Checkpoints(out / CHECKPOINTS).paths())


def check_unused(config: JobConfig, resume: bool, overwrite: bool) -> None:
    """Check that a run with this config may write to `config.out`; writes nothing.

    A run to resume may have another number of epochs: `check_extension` says whether it fits.

    Raises:
        RunExistsError: the folder holds a run, or the run to resume has another config.
        ValueError, OSError: the config of the existing run cannot be read.
    """
    out = config.out
    if overwrite:
        _check_kept(config)
    if overwrite or not (out / CONFIG).exists():
        return
    if not resume:
        state, ways = "an unfinished run", "--resume goes on with it, --overwrite starts again"
        if is_finished(out):
            state, ways = "a finished run", "--resume with more --epochs goes on with it, --overwrite starts again"
        raise RunExistsError(f"{out} holds {state}: choose another folder; {ways}")
    saved = config_file.load(out / CONFIG)
    changed = config_file.differences(saved, config)
    changed = {name: values for name, values in changed.items() if not _may_change(name, *values)}
    if set(changed) - {"optim.epochs"}:
        words = ", ".join(f"{name} {old!r} instead of {new!r}" for name, (old, new) in changed.items())
        raise RunExistsError(
            f"{out} cannot be resumed, as it was started with {words}: --resume with the old settings goes on, "
            "--overwrite starts again with the new ones"
        )


def _may_change(name: str, old: object, new: object) -> bool:
    """Whether a setting may have another value on resume."""
    if name == "teacher_cache" and (old is None or new is None):
        return False  # with a cache the feature loss compares pooled maps, without one full maps
    return is_free(name)


def _check_kept(config: JobConfig) -> None:
    """
    Raises:
        ValueError: the weights of a teacher or the initial ones lie in the folder that is to be overwritten.
    """
    out = config.out.resolve()
    removed = {out / name for name in (*_FILES, *_FOLDERS)}
    for source in (*getattr(config, "teachers", ()), *filter(None, [config.init])):
        path = source.path()
        if path is not None and ((real := path.resolve()) == out or not removed.isdisjoint([real, *real.parents])):
            raise ValueError(f"{config.out} cannot be overwritten: {source}, from which this run starts, is in it")


def check_extension(config: JobConfig, before: int, completed: int, per_epoch: int, peak: float, extend: bool) -> bool:
    """Check that a run that was started for `before` epochs may go on to those of `config`.

    It may if all completed steps had the learning rates of the new number of epochs: then it ends as a run that had
    this number from the start. Otherwise only with `extend`.

    Args:
        completed: steps, `per_epoch` of them in an epoch.
        peak: highest learning rate.

    Returns:
        Whether a completed step had another learning rate.

    Raises:
        RunExistsError: more steps are completed than the epochs have, or learning rates differ; the message has both.
    """
    out, optim = config.out, config.optim
    if completed > optim.epochs * per_epoch:
        raise RunExistsError(
            f"{out} has trained {completed / per_epoch:.4g} epochs, more than the {optim.epochs} of --epochs: "
            "resume it with more, or --overwrite it"
        )
    change = last_change(replace(optim, epochs=before), optim, peak, completed, per_epoch)
    if change is None:
        return False
    words = (
        f"the {optim.schedule} schedule depends on the number of epochs: step {change.step + 1} of {out} had the "
        f"learning rate {change.old:.4g} of {before} epochs, not the {change.new:.4g} of {optim.epochs} epochs"
    )
    if completed == optim.epochs * per_epoch:
        advice, note = "--extend ends the run here", "the run ends here"
    else:
        rate = learning_rate(optim, peak, completed, per_epoch)
        advice = f"--extend goes on with step {completed + 1} at {rate:.4g}"
        note = f"step {completed + 1} goes on at {rate:.4g}"
    if not extend:
        raise RunExistsError(f"{words}; {advice}")
    warnings.warn(f"{words}; {note}", stacklevel=2)
    return True


def prepare(config: JobConfig, resume: bool) -> None:
    """Create `config.out` with the config in it; unless resuming, remove an earlier run.

    A run that is resumed for another number of epochs is unfinished from here on.

    Raises:
        OSError: the folder cannot be written; the message names it.
    """
    out = config.out
    try:
        if not (resume and (out / CONFIG).exists()):
            _remove(out)
            out.mkdir(parents=True, exist_ok=True)
            config_file.save(config, out / CONFIG)
        elif epochs_before(config) is not None:
            for name in (MODEL, AVERAGED_MODEL, REPORT):
                (out / name).unlink(missing_ok=True)
            config_file.save(config, out / CONFIG)
    except OSError as error:
        raise OSError(error.errno, f"cannot write the run folder {out}: {error.strerror}") from error


def _remove(out: Path) -> None:
    """Remove a run's files, and no other files of the folder."""
    for name in _FILES:
        (out / name).unlink(missing_ok=True)
    for name in _FOLDERS:
        if (out / name).exists():
            shutil.rmtree(out / name)
    (out / CONFIG).unlink(missing_ok=True)


def folder_of(run: Path) -> Path:
    """The folder of a run that is given by its folder or by a model file in it."""
    return run.parent if run.is_file() else run


def model_metadata(run: Path) -> dict[str, Any]:
    """Metadata of a run's model: model, num_classes, class_names, in_channels, data, size (H, W), mean and std.

    Mean and std are pixel levels. The class names are None if unknown, and missing in files of earlier versions.
    """
    return read_model(_model_file(run))[1]


def load_model(run: Path) -> nn.Module:
    """Trained model of a finished run folder or of a model file, on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: there is no model; the message names the folder.
        CheckpointError: the file is damaged, or its tensors do not fit its model.
        ValueError: unknown model name.
    """
    return model_file.load_model(_model_file(run)).model


def _model_file(run: Path) -> Path:
    path = run / MODEL if run.is_dir() else run
    if not path.exists():
        state = "an unfinished run" if (run / CONFIG).exists() else "no run"
        raise FileNotFoundError(f"{path} does not exist: {run} holds {state}")
    return path
