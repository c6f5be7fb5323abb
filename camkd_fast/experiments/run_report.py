"""report.html of one run: results, training curves, teacher weights, confusion matrices, throughput and settings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import models
from ..data.files import ImageSet
from ..models import sources
from ..models.model_file import MODEL
from ..report.page import Figures, Folded, Part, Section, Table, rate, write_page
from ..report.plots import (
    BLUE,
    GREY,
    ORANGE,
    PURPLE,
    TEACHER_COLORS,
    VERMILLION,
    ClassMatrix,
    Curve,
    Panel,
    class_accuracies,
    confusions,
    curves,
)
from ..train import config_file
from ..train.class_map import ClassMap
from ..train.config import DistillConfig, JobConfig, TeachConfig
from ..train.confusion import Confusion, confusion
from ..train.journal import METRICS, read_metrics
from ..train.run_folder import CONFIG, REPORT, is_finished
from ..train.run_images import load_splits
from ..train.source_strings import SourceString, labels
from ..train.teachers.fitted import fitted

Record = Mapping[str, Any]
_MOST_CLASSES_IN_A_MATRIX = 20  # beyond it the cells of a matrix are too small to read


def write(run: Path, environment: Mapping[str, str]) -> Path:
    """Write `run/report.html` and return its path.

    Student and teachers are evaluated on the validation images, so the data set and the teachers must be where the
    config says.

    Args:
        run: folder of a run with at least one finished epoch.
        environment: versions and machine, for the footer.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: the run, a teacher or the data set is missing, damaged or
            empty; the message names the file.
        OSError: the page cannot be written.
    """
    config = config_file.load(run / CONFIG)
    records = read_metrics(run / METRICS)
    epochs = [record for record in records if record["kind"] == "epoch"]
    if not epochs:
        raise ValueError(f"{run / METRICS} has no finished epoch to report")
    test = next((record for record in records if record["kind"] == "test"), None)
    steps = [record for record in records if record["kind"] == "steps"]
    _place(records, epochs[-1])
    evaluated = _Models(run, config)
    job = "teach" if isinstance(config, TeachConfig) else "distill"
    sections = [
        _result(config, epochs, test, evaluated),
        _training(steps, epochs),
        *([_weights(steps, epochs, evaluated.names)] if epochs[-1]["weights"] else []),
        *([_confusion(evaluated)] if evaluated.confusion is not None else []),
        _speed(steps, epochs, test),
        settings(
            config,
            "Settings that differ from the defaults. "
            f"`camkd-fast {job} --config {run / CONFIG} --out FOLDER` repeats the run{_extended(records)}.",
        ),
    ]
    page = run / REPORT
    write_page(page, _title(config), _lead(run, config, records), sections, footer(environment))
    return page


def _extended(records: Sequence[Record]) -> str:
    """The difference of a run that was extended to one of its final number of epochs; empty for any other run."""
    return "".join(
        f", but for epochs up to {record['epoch']}, which had the learning rates of {record['epochs_before']} epochs"
        for record in records
        if record["kind"] == "extended"
    )


def _title(config: JobConfig) -> str:
    if isinstance(config, DistillConfig):
        return f"{config.student} distilled by {config.strategy} on {config.data.data}"
    return f"{config.model} trained on {config.data.data}"


def _lead(run: Path, config: JobConfig, records: Sequence[Record]) -> str:
    done = max(record["epoch"] for record in records if record["kind"] == "epoch")
    learned = f"{run}: {done} of {config.optim.epochs} epochs, seed {config.seed}."
    for record in records:
        if record["kind"] == "init":
            drawn = ", its classifier drawn anew" if record["classifier"] == "drawn" else ""
            learned += f" Initial weights: {record['source']} (sha256 {record['sha256'][:12]}){drawn}."
    if isinstance(config, TeachConfig):
        wrong = f" {config.wrong_labels:.0%} of the training labels are deliberately wrong."
        return learned + (wrong if config.wrong_labels else "")
    return f"{learned} Teachers: {', '.join(map(str, config.teachers)) or 'none'}."


def footer(environment: Mapping[str, str]) -> str:
    """Versions and machine in one line."""
    return ", ".join(f"{name} {value}" for name, value in environment.items())


class _Models:
    """The models of a run, the trained one last, and their predictions on its validation images."""

    def __init__(self, run: Path, config: JobConfig) -> None:
        teachers = config.teachers if isinstance(config, DistillConfig) else ()
        self.names = labels(teachers)
        loaded = [sources.load(teacher) for teacher in teachers]
        given = list(teachers)
        if is_finished(run):
            self.names.append("student" if isinstance(config, DistillConfig) else "model")
            loaded.append(sources.load(str(run / MODEL)))
            given.append(SourceString(run))
        self.models: list[nn.Module] = [source.model for source in loaded]
        self.architectures = [source.architecture for source in loaded]
        self.confusion: Confusion | None = None
        images: ImageSet = load_splits(config.data).validation
        self.images = len(images)
        if self.models and self.images:
            gpu = config.precision.device != "cpu" and torch.cuda.is_available()
            file = config.class_map if isinstance(config, DistillConfig) else None
            class_map = None if file is None else ClassMap.read(file, teachers)
            ready = [
                fitted(name, models.freeze(source.model).to("cuda" if gpu else "cpu"), source, images, class_map).model
                for name, source in zip(given, loaded, strict=True)
            ]
            self.confusion = confusion(ready, images, config.data.loader, config.data.skip_bad)

    def table(self, weights: Sequence[float]) -> Table:
        """One row per model; `weights` are the teachers' mean weights, or empty."""
        rows = []
        for k, (name, architecture, model) in enumerate(zip(self.names, self.architectures, self.models, strict=True)):
            accuracy = "" if self.confusion is None else f"{100 * self.confusion.accuracy(k):.2f} %"
            parameters = sum(p.numel() for p in model.parameters())
            weight = [f"{weights[k]:.3f}" if k < len(weights) else ""] if weights else []
            rows.append((name, architecture, f"{parameters:,}", accuracy, *weight))
        header = ("", "model", "parameters", "validation accuracy", *(["mean weight"] if weights else []))
        return Table(header, rows)


def _result(config: JobConfig, epochs: Sequence[Record], test: Record | None, evaluated: _Models) -> Section:
    validated = [record for record in epochs if "validation_accuracy" in record]
    numbers = {}
    if test is not None:
        numbers["test accuracy"] = f"{100 * test['test_accuracy']:.2f} %"
        numbers["test cross-entropy"] = f"{test['test_loss']:.3f}"
        if "ema_test_accuracy" in test:
            numbers["test accuracy, average"] = f"{100 * test['ema_test_accuracy']:.2f} %"
    if validated:
        numbers["validation accuracy"] = f"{100 * validated[-1]['validation_accuracy']:.2f} %"
    if test is not None:
        if speed := rate(test["images_per_second"]):
            numbers["images per second"] = speed
        numbers["total time"] = duration(test["seconds"])
        text = (
            "Results of the model after the last epoch: no epoch is selected, and the test images are used only once, "
            "at the end."
        )
    else:
        text = f"Not finished: {epochs[-1]['epoch']} of {config.optim.epochs} epochs are done."
    parts: list[Part] = [Figures(numbers)] if numbers else []
    if evaluated.models:
        parts.append(evaluated.table(epochs[-1]["weights"]))
    return Section("Result", text, parts)


def duration(seconds: float) -> str:
    """A duration as text."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def _points(steps: Sequence[Record], epochs: Sequence[Record]) -> Sequence[Record]:
    """The log records within epochs if there are at least two per epoch, else the epochs' records."""
    return steps if len(steps) >= 2 * len(epochs) else epochs


def _curve(label: str, color: str, records: Sequence[Record], values: Sequence[float], dashed: bool = False) -> Curve:
    """A curve over epochs; `records` have the position of each value."""
    return Curve(label, color, [values], dashed, [record["at"] for record in records])


def _training(steps: Sequence[Record], epochs: Sequence[Record]) -> Section:
    points = _points(steps, epochs)
    parts = [
        ("total", GREY, [r["loss"] for r in points]),
        ("cross-entropy", BLUE, [r["hard"] for r in points]),
        ("distillation", ORANGE, [r["loss"] - r["hard"] - r["feature"] for r in points]),
        ("features", PURPLE, [r["feature"] for r in points]),
    ]
    # Parts that are 0 throughout are left out; a single part equals the total.
    total, *others = parts
    present = [total, *(part for part in others if max(part[2]) > 1e-6 * max(total[2]))]
    shown = present[1:] if len(present) == 2 else present
    largest, least = max(parts[0][2]), min(min(part[2]) for part in shown)
    losses = Panel(
        "Loss",
        "mean per image, weighted" if len(shown) > 1 else "cross-entropy",
        [_curve(label, color, points, values) for label, color, values in shown],
        logarithmic=least > 0 and largest > 30 * least,
    )
    accuracy = Panel(
        "Accuracy",
        "accuracy (%)",
        [
            _curve("training, augmented", GREY, epochs, [100 * r["train_accuracy"] for r in epochs], dashed=True),
            *_validated("validation", VERMILLION, epochs, "validation_accuracy"),
            *_validated("validation, average", BLUE, epochs, "ema_validation_accuracy"),
        ],
    )
    text = (
        "Each part of the loss is multiplied by its weight in the total. Training accuracy is accumulated during the "
        "epoch, validation accuracy is measured after it."
    )
    return Section("Training", text, [curves((losses, accuracy))])


def _validated(label: str, color: str, epochs: Sequence[Record], name: str) -> list[Curve]:
    """The curve of an accuracy over the epochs that have it."""
    validated = [record for record in epochs if name in record]
    return [_curve(label, color, validated, [100 * r[name] for r in validated])] if validated else []


def _place(records: Sequence[dict[str, Any]], last: Record) -> None:
    """Add "at" to the records: the position in epochs."""
    per_epoch = last["step"] / last["epoch"]
    for record in records:
        record["at"] = record["step"] / per_epoch


def _weights(steps: Sequence[Record], epochs: Sequence[Record], names: Sequence[str]) -> Section:
    points = _points(steps, epochs)
    lines = []
    for of, kind in (("weights", "logits"), ("feature_weights", "features")):
        for k in range(len(points[-1][of])):
            color = TEACHER_COLORS[k % len(TEACHER_COLORS)]
            values = [record[of][k] for record in points]
            lines.append(_curve(f"{names[k]}, {kind}", color, points, values, dashed=kind == "features"))
    text = (
        "Mean weight of each teacher over the images. Logit weights that depend only on teachers and labels are "
        "constant; feature weights depend on the logits that each teacher's classifier computes from the student's "
        "features, so they change during training."
    )
    return Section("Weights of the teachers", text, [curves((Panel("Mean weight per teacher", "mean weight", lines),))])


def _confusion(evaluated: _Models) -> Section:
    assert evaluated.confusion is not None
    matrices = [ClassMatrix(name, evaluated.confusion.shares(k)) for k, name in enumerate(evaluated.names)]
    C = len(matrices[0].shares)
    picture = confusions(matrices) if C <= _MOST_CLASSES_IN_A_MATRIX else class_accuracies(matrices)
    text = f"Predictions on the {evaluated.images:,} validation images, by true class." + (
        "" if C <= _MOST_CLASSES_IN_A_MATRIX else " Each cell is the accuracy on one class."
    )
    K = len(matrices)
    if K > 1:
        none, every = (int(evaluated.confusion.right[i]) / max(evaluated.images, 1) for i in (0, K))
        text += f" All models are right on {every:.1%} of them, none on {none:.1%}."
    return Section("Confusion matrices", text, [picture])


def _speed(steps: Sequence[Record], epochs: Sequence[Record], test: Record | None) -> Section:
    points = [record for record in _points(steps, epochs) if record["images_per_second"] > 0]
    panels = [Panel("Learning rate", "learning rate", [_rate_curve(steps, epochs)])]
    if points:
        speed = _curve("images per second", BLUE, points, [r["images_per_second"] for r in points])
        panels.insert(0, Panel("Throughput", "images per second", [speed], from_zero=True))
    start = test["start_seconds"] if test is not None else epochs[-1]["start_seconds"]
    text = (
        "Training steps over all processes, without evaluation and checkpoints. The first steps, including "
        f"compilation and loading, took {start:.2f} s and are excluded."
    )
    return Section("Throughput", text, [curves(panels)])


def _rate_curve(steps: Sequence[Record], epochs: Sequence[Record]) -> Curve:
    points = sorted([*steps, *epochs], key=lambda record: int(record["step"]))
    return _curve("learning rate", GREY, points, [record["learning_rate"] for record in points])


def settings(config: JobConfig, text: str) -> Section:
    """Table of the settings that differ from the defaults, and a folded table of all settings."""
    usual = config_file.differences(config, type(config)())
    changed = [
        (name, _shown(value), _shown(default))
        for name, (value, default) in usual.items()
        if not name.startswith(("out", "log."))
    ]
    everything = [(name, _shown(value)) for name, value in config_file.flat(dataclasses.asdict(config)).items()]
    folded = Folded("All settings", Table(("setting", "value"), everything))
    return Section("Settings", text, [Table(("setting", "value", "default"), changed), folded])


def _shown(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, float) and not math.isinf(value):
        return f"{value:g}"
    return "none" if value is None else str(value)
