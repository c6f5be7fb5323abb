"""A run folder: its files, checks before writing to it, and loading its model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import nn

from .. import models
from . import config_file
from .checkpoint import CheckpointError, read_model
from .config import JobConfig
from .journal import METRICS

CONFIG, MODEL, REPORT = "config.yaml", "model.safetensors", "report.html"
CHECKPOINTS, TENSORBOARD = "checkpoints", "tensorboard"
# Settings that may differ on resume: locations, logging, and how many files may be unreadable.
FREE = ("out", "teacher_cache", "data.root", "data.workers", "data.skip_bad", "precision.device", "log.")


class RunExistsError(RuntimeError):
    """The folder holds a run, and neither resume nor overwrite applies."""


def is_finished(out: Path) -> bool:
    """Whether a run finished here: the model is the last file that it writes."""
    return (out / MODEL).exists()


def check_free(config: JobConfig, resume: bool, overwrite: bool) -> None:
    """Check that a run with this config may write to `config.out`; writes nothing.

    Raises:
        RunExistsError: the folder holds a run, or the run to resume has another config.
        ValueError, OSError: the config of the existing run cannot be read.
    """
    out = config.out
    if overwrite or not (out / CONFIG).exists():
        return
    if not resume:
        state, ways = "an unfinished", "resume or overwrite it"
        if is_finished(out):
            state, ways = "a finished", "overwrite it"
        raise RunExistsError(f"{out} holds {state} run: choose another folder, or {ways}")
    saved = config_file.load(out / CONFIG)
    changed = config_file.differences(saved, config)
    changed = {name: values for name, values in changed.items() if not name.startswith(FREE)}
    if changed:
        words = ", ".join(f"{name} {old!r} instead of {new!r}" for name, (old, new) in changed.items())
        raise RunExistsError(f"{out} cannot be resumed, as it was started with {words}")


def prepare(config: JobConfig, resume: bool) -> None:
    """Create `config.out` with the config in it; unless resuming, remove an earlier run.

    Raises:
        OSError: the folder cannot be written; the message names it.
    """
    out = config.out
    try:
        if not (resume and (out / CONFIG).exists()):
            _remove(out)
            out.mkdir(parents=True, exist_ok=True)
            config_file.save(config, out / CONFIG)
    except OSError as error:
        raise OSError(error.errno, f"cannot write the run folder {out}: {error.strerror}") from error


def _remove(out: Path) -> None:
    """Remove a run's files, and no other files of the folder."""
    for name in (MODEL, METRICS, REPORT):  # the model first: without it the run counts as unfinished
        (out / name).unlink(missing_ok=True)
    for name in (CHECKPOINTS, TENSORBOARD):
        if (out / name).exists():
            shutil.rmtree(out / name)
    (out / CONFIG).unlink(missing_ok=True)


def model_metadata(run: Path) -> dict[str, Any]:
    """Metadata of a run's model: model, num_classes, class_names, in_channels, data, size (H, W), mean and std.

    Mean and std are pixel levels. The class names are None if unknown, and missing in files of earlier versions.
    """
    return _read(run)[1]


def load_model(run: Path) -> nn.Module:
    """Trained model of a finished run folder or of a model file, on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: there is no model; the message names the folder.
        CheckpointError: the file is damaged, or its tensors do not fit its model.
        ValueError: unknown model name.
    """
    tensors, metadata = _read(run)
    model = models.create(metadata["model"], metadata["num_classes"], metadata["in_channels"])
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the model of {run} does not fit {metadata['model']}: {reason}") from error
    return model.eval()


def _read(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    path = run / MODEL if run.is_dir() else run
    if not path.exists():
        state = "an unfinished run" if (run / CONFIG).exists() else "no run"
        raise FileNotFoundError(f"{path} does not exist: {run} holds {state}")
    return read_model(path)
