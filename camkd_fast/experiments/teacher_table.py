"""Sources of teachers compared on a data set: what they are, how good and how fast, and how much they agree."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import models
from ..data import choose
from ..data.batch import Loader
from ..data.files import ImageSet
from ..models import sources
from ..models.protocol import Source
from ..models.split import LogitsOnly
from ..report.page import Table, rate
from ..train.class_map import ClassMap
from ..train.config import DataConfig, PrecisionConfig, TeachConfig
from ..train.distributed import World, processes
from ..train.run_images import EVALUATION_BATCH, load_splits, loader_config
from ..train.source_strings import SourceString, labels
from ..train.teachers.fitted import fitted


@dataclass(frozen=True)
class TeacherRow:
    """A source, and its model on the images."""

    name: str
    source: Source
    parameters: int
    classes: int
    accuracy: float
    images_per_second: float


class Comparison(NamedTuple):
    teachers: list[TeacherRow]
    agreement: list[list[float]]  # (K, K) shares of images on which two teachers predict the same class
    split: str
    images: int


def compare_teachers(
    names: Sequence[SourceString],
    data: DataConfig,
    split: str = "auto",
    *,
    class_map: Path | None = None,
    device: str = "auto",
    batch_size: int = EVALUATION_BATCH,
) -> Comparison:
    """Run all teachers, in float32 and as `distill` would, on the same unaugmented images.

    Args:
        split: "train", "validation", "test", or "auto": validation, or test if no image is held out.
        batch_size: images per process.

    Raises:
        ValueError: no source is given; or as `load_teachers`; or the split is empty.
        OSError, CheckpointError: as `sources.load` and `load_splits`.
    """
    if not names:
        raise ValueError("teachers compares one or more sources, got none")
    parts = load_splits(data)
    if split == "auto":
        split = "validation" if len(parts.validation) else "test"
    images: ImageSet = getattr(parts, split)
    if not len(images):
        raise ValueError(f"the {split} part of {data.data} is empty")
    config = TeachConfig(data=data, precision=PrecisionConfig(device=device))  # type: ignore[arg-type]
    classes = None if class_map is None else ClassMap.read(class_map, names)
    with processes(device) as world:
        found = [sources.load(name) for name in names]
        ready = []
        for name, source in zip(names, found, strict=True):
            model = models.freeze(source.model).to(world.device)
            ready.append(fitted(name, model, source, images, classes))
        settings = loader_config(config, world, batch_size, None)
        with closing(choose.loader(images, settings, data.loader)) as loader:
            count, right, same, speed = _measure([teacher.model for teacher in ready], loader, world)
    sizes = [sum(p.numel() for p in source.model.parameters()) for source in found]
    teachers = [
        TeacherRow(name, source, size, fit.classes, int(r) / count, float(s))
        for name, source, size, fit, r, s in zip(labels(names), found, sizes, ready, right, speed, strict=True)
    ]
    return Comparison(teachers, (same / count).tolist(), split, count)


@torch.no_grad()
def _measure(ready: Sequence[nn.Module], loader: Loader, world: World) -> tuple[int, Tensor, Tensor, Tensor]:
    """Over all processes: images, right answers (K,), equal answers (K, K) and images per second (K,)."""
    K = len(ready)
    counts = torch.zeros(1 + K + K * K, dtype=torch.float64, device=world.device)
    seconds, timed = torch.zeros(K, dtype=torch.float64), 0
    for number, batch in enumerate(loader):
        if number == 1:  # the first batch allocates
            seconds.zero_()
            timed = 0
        answers = []
        for k, model in enumerate(ready):
            started = _now(world)
            answers.append(model(batch.images).argmax(1))
            seconds[k] += _now(world) - started
        timed += batch.target.numel()
        stacked = torch.stack(answers)
        counts[0] += batch.target.numel()
        counts[1 : K + 1] += (stacked == batch.target).sum(1)
        counts[K + 1 :] += (stacked.unsqueeze(0) == stacked.unsqueeze(1)).sum(2).flatten()
    counts = world.sum(counts).cpu()
    speed = world.sum((timed / seconds).to(world.device)).cpu()
    return int(counts[0]), counts[1 : K + 1], counts[K + 1 :].view(K, K), speed


def _now(world: World) -> float:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.perf_counter()


# --- output ----------------------------------------------------------------------------------------------------------


def table(comparison: Comparison) -> Table:
    rows = []
    for teacher in comparison.teachers:
        source = teacher.source
        rows.append(
            (
                *(teacher.name, source.architecture, f"{teacher.parameters:,}", f"{teacher.classes:,}"),
                "unknown" if source.size is None else "{}x{}".format(*source.size),
                *(_numbers(source.mean), _numbers(source.std), _channels(source)),
                *(f"{100 * teacher.accuracy:.2f} %", rate(teacher.images_per_second)),
            )
        )
    header = (
        "teacher",
        "model",
        "parameters",
        "classes",
        "size",
        "mean",
        "std",
        "map channels",
        "accuracy",
        "images/s",
    )
    return Table(header, rows)


def agreement(comparison: Comparison) -> Table:
    names = [teacher.name for teacher in comparison.teachers]
    rows = zip(names, comparison.agreement, strict=True)
    return Table(("equal predictions", *names), [(name, *(f"{100 * s:.1f} %" for s in row)) for name, row in rows])


def notes(comparison: Comparison) -> list[str]:
    """What the table leaves open, one line each: why a teacher has no feature map, which images it gets."""
    lines = []
    for teacher in comparison.teachers:
        if isinstance(teacher.source.model, LogitsOnly):
            lines.append(f"{teacher.name} has no feature map: {teacher.source.model.reason}")
        if teacher.source.mean is None:
            lines.append(f"{teacher.name} gets images with the data's mean and std, as its own are unknown")
    return lines


def _numbers(values: tuple[float, ...] | None) -> str:
    return "unknown" if values is None else " ".join(f"{value:.4g}" for value in values)


def _channels(source: Source) -> str:
    return "none" if isinstance(source.model, LogitsOnly) else f"{source.model.num_features:,}"
