"""The demonstration: a small student learns handwritten digits from three teachers, one of them poor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..data.files import ImageSet
from ..data.images import LabelledImages, stratified_parts
from ..losses.feature import confidence_weights
from ..train import run
from ..train.config import DataConfig, DistillConfig, JobConfig, LogConfig, OptimConfig, TeachConfig
from ..train.journal import METRICS, read_metrics, result_record
from ..train.run_folder import load_model
from ..train.run_images import load_splits
from ..train.source_strings import SourceString
from ..train.strategies import AVER, CAMKD, CE
from . import compare
from .compare import CompareConfig, Row
from .loss_speed import LossSpeed, measure_loss_speed

DATA = "digits"
STUDENTS = (CE.name, AVER.name, CAMKD.name)


@dataclass(frozen=True)
class DemoTeacher:
    name: str
    model: str
    epochs: int
    images: int | None = None  # number of training images; None: all
    wrong_labels: float = 0.0  # fraction of training labels replaced by wrong ones
    augmentation: Literal["auto", "none"] = "auto"  # without augmentation a model can memorise its images


@dataclass(frozen=True)
class DemoConfig:
    """Settings, chosen on validation images; the test images are used once, after the last epoch."""

    # The poor teacher has memorised few images, most of them with a wrong label. They include the students' images, so
    # it is confidently right on some of these and wrong on most: the case for per-sample weights.
    teachers: tuple[DemoTeacher, ...] = (
        DemoTeacher("teacher A", "resnet20", epochs=8),
        DemoTeacher("teacher B", "resnet8x4", epochs=5),
        DemoTeacher("poor teacher", "resnet20", epochs=30, images=300, wrong_labels=0.65, augmentation="none"),
    )
    student: str = "resnet8"
    # With more images, cross-entropy is already so good on digits that distillation gains nothing.
    student_images: int = 100
    student_epochs: int = 30
    batch_size: int = 32
    alpha: float = 1.0
    beta: float = 50 / 3  # the official code's 50, which it divides by the number of teachers
    seeds: tuple[int, ...] = (0, 1, 2)
    speed_shape: tuple[int, int, int] = (1024, 1000, 3)  # rows, classes, teachers
    compiled: bool = True  # also time torch.compile, which takes 10 to 20 s to compile

    def teacher(self, k: int, out: Path) -> TeachConfig:
        """Config of the k-th teacher, with seed k."""
        spec = self.teachers[k]
        return TeachConfig(
            model=spec.model,
            seed=k,
            out=out / "teachers" / spec.name.replace(" ", "-"),
            wrong_labels=spec.wrong_labels,
            data=DataConfig(data=DATA, images=spec.images, augmentation=spec.augmentation),
            optim=self._optim(spec.epochs),
            log=LogConfig(tensorboard=False, progress=False),
        )

    def students(self, out: Path) -> CompareConfig:
        """Config of the comparison."""
        base = DistillConfig(
            student=self.student,
            teachers=tuple(SourceString(self.teacher(k, out).out) for k in range(len(self.teachers))),
            alpha=self.alpha,
            beta=self.beta,
            out=out / "students",
            data=DataConfig(data=DATA, images=self.student_images, augmentation="none"),
            optim=self._optim(self.student_epochs),
            log=LogConfig(tensorboard=False, progress=False),
        )
        return CompareConfig(STUDENTS, self.seeds, base)

    def _optim(self, epochs: int) -> OptimConfig:
        return OptimConfig(epochs=epochs, batch_size=self.batch_size, learning_rate=0.05, schedule="cosine")


@dataclass(frozen=True)
class TeacherResult:
    spec: DemoTeacher
    test_accuracy: float
    images_per_second: float
    epochs: list[dict[str, Any]]  # the "epoch" records of the run


@dataclass(frozen=True)
class DemoResults:
    config: DemoConfig
    sizes: tuple[int, int, int]  # training, validation and test images
    teachers: list[TeacherResult]
    students: list[Row]
    weights: Tensor  # (K, N) confidence weights on the students' training images
    speed: LossSpeed


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread: on 8x8 images a second one gains 10 to 30 % on an idle core and is far slower on a busy one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run_demo(config: DemoConfig, out: Path) -> DemoResults:
    """Train everything into run folders under `out`, then time the loss on all threads; errors as `run.teach`.

    Overwrites the runs of an earlier demonstration.
    """
    from tqdm import tqdm

    parts = load_splits(DataConfig(data=DATA))
    jobs = [config.teacher(k, out) for k in range(len(config.teachers))]
    comparison = config.students(out)
    cells = list(comparison.cells())
    every: list[JobConfig] = [*jobs, *cells]
    work = [job.optim.epochs * (job.data.images or len(parts.train)) for job in every]
    with one_thread(), tqdm(total=sum(work), unit="img", dynamic_ncols=True) as bar:
        # The bar counts images, so that its rate is comparable between runs.
        for job, spec, images in zip(jobs, config.teachers, work, strict=False):
            bar.set_description(spec.name)
            run.teach(job, overwrite=True)
            bar.update(images)
        for cell, images in zip(cells, work[len(jobs) :], strict=True):
            bar.set_description(f"{cell.strategy}, seed {cell.seed}")
            compare.run_cell(cell, overwrite=True)
            bar.update(images)
        bar.set_description("trained")
        weights = teacher_weights([job.out for job in jobs], parts.train, config.student_images)
    teachers = [_teacher_result(spec, job.out) for spec, job in zip(config.teachers, jobs, strict=True)]
    speed = measure_loss_speed(*config.speed_shape, compiled=config.compiled)
    sizes = (len(parts.train), len(parts.validation), len(parts.test))
    return DemoResults(config, sizes, teachers, compare.collect(comparison), weights, speed)


def _teacher_result(spec: DemoTeacher, folder: Path) -> TeacherResult:
    test, epochs = result_record(folder / METRICS), read_metrics(folder / METRICS, "epoch")
    return TeacherResult(spec, test["test_accuracy"], test["images_per_second"], epochs)


@torch.no_grad()
def teacher_weights(teachers: list[Path], train: ImageSet, count: int) -> Tensor:
    """Confidence weights (K, count) of trained teachers on the training images of a run with `images=count`."""
    assert isinstance(train, LabelledImages)
    few = train.take(stratified_parts(train.labels, [count], seed=DataConfig().split_seed)[0])
    images = few.normalise(few.pixels)
    weights, _ = confidence_weights([load_model(path)(images) for path in teachers], few.labels)
    return weights
