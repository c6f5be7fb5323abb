"""The demonstration: three teachers, one of them poor, and what a small student makes of them, on real digits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import mean, stdev

import torch
from torch import Tensor, nn

from .. import models
from ..data import LabelledImages, corrupt_labels, stratified_parts
from ..data.digits import TEST, TRAIN, VALIDATION, DigitSplits, load_digits
from ..feature_loss import confidence_weights
from ..models.protocol import feature_model
from .config import TrainConfig
from .loop import EpochRecord, History, accuracy, fit
from .loss_speed import LossSpeed, measure_loss_speed
from .strategies import CAMKD, HardLabels, LogitDistillation, Strategy
from .teachers import ImageTeachers as Teachers


@dataclass(frozen=True)
class TeacherSpec:
    name: str
    model: str
    epochs: int
    images: int | None = None  # of the training part; None: all
    wrong_labels: float = 0.0  # share of its training labels that were replaced
    shift: int = 1  # augmentation in pixels; 0 lets a model learn its images by heart


@dataclass(frozen=True)
class DemoConfig:
    """Settings, chosen on the validation part; the test part is looked at once, after the last epoch."""

    # The poor teacher knows few images by heart, most under a wrong label, and is sure of them. Those images include
    # the students', so on some of them it is right and on most wrong: what per-sample weights are made for.
    teachers: tuple[TeacherSpec, ...] = (
        TeacherSpec("teacher A", "resnet20", epochs=8),
        TeacherSpec("teacher B", "resnet8x4", epochs=5),
        TeacherSpec("poor teacher", "resnet20", epochs=30, images=300, wrong_labels=0.65, shift=0),
    )
    student: str = "resnet8"
    # Few images, or cross-entropy alone leaves nothing to gain on digits.
    student_images: int = 100
    student_epochs: int = 30
    batch_size: int = 32
    alpha: float = 1.0
    beta: float = 50 / 3  # what the official code's 50 amounts to, as it divides by the number of teachers
    seeds: tuple[int, ...] = (0, 1, 2)
    speed_shape: tuple[int, int, int] = (1024, 1000, 3)  # rows, classes, teachers
    compiled: bool = True  # compare with torch.compile too, some 10 to 20 s of compilation


@dataclass(frozen=True)
class TeacherResult:
    spec: TeacherSpec
    test_accuracy: float
    history: History


@dataclass(frozen=True)
class StudentResult:
    """One strategy over all seeds."""

    strategy: str
    test_accuracy: list[float]  # per seed
    histories: list[History]

    @property
    def mean(self) -> float:
        return mean(self.test_accuracy)

    @property
    def spread(self) -> float:
        """Sample standard deviation over seeds; 0 for a single one."""
        return stdev(self.test_accuracy) if len(self.test_accuracy) > 1 else 0.0

    @property
    def images_per_second(self) -> float:
        return sum(h.images for h in self.histories) / sum(h.seconds for h in self.histories)


@dataclass(frozen=True)
class DemoResults:
    config: DemoConfig
    sizes: tuple[int, int, int]  # images in the training, validation and test part
    teachers: list[TeacherResult]
    students: list[StudentResult]
    weights: Tensor  # (K, N): confidence weights on the students' training images
    speed: LossSpeed


class Progress:
    """A tqdm bar that counts training images, so that its rate means the same for every run."""

    def __init__(self, total: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=total, unit="img", desc="starting", dynamic_ncols=True)

    def run(self, name: str, images: int) -> Callable[[EpochRecord], None]:
        """A callback for one training run over `images` images per epoch."""
        self._bar.set_description(name)

        def on_epoch(record: EpochRecord) -> None:
            self._bar.set_postfix_str(f"loss {record.loss:.3f}, validation {100 * record.validation_accuracy:.1f} %")
            self._bar.update(images)

        return on_epoch

    def close(self) -> None:
        self._bar.set_description("trained")
        self._bar.close()


def seeded_model(name: str, data: LabelledImages, seed: int) -> nn.Module:
    """A new model whose parameters depend on `seed` only; torch's global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return models.create(name, data.num_classes, data.pixels.shape[1])


@contextmanager
def one_thread() -> Iterator[None]:
    """On 8x8 images a second thread gains 10 to 30 % when its core is idle, and costs multiples when it is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def first_images(data: LabelledImages, count: int) -> LabelledImages:
    """`count` images with every class in proportion; a smaller count takes a part of what a larger one takes."""
    return data.take(stratified_parts(data.labels, [count], seed=0)[0])


def train_teacher(
    spec: TeacherSpec, seed: int, batch_size: int, data: DigitSplits, progress: Progress
) -> tuple[nn.Module, History]:
    train = data.train if spec.images is None else first_images(data.train, spec.images)
    if spec.wrong_labels:
        train = replace(train, labels=corrupt_labels(train.labels, train.num_classes, spec.wrong_labels, seed))
    model = seeded_model(spec.model, train, seed)
    on_epoch = progress.run(spec.name, len(train))
    config = TrainConfig(spec.epochs, seed, batch_size, shift=spec.shift)
    history = fit(model, HardLabels(), train, data.validation, config, on_epoch)
    return model, history


# Name -> what makes the strategy for a student with that many feature channels.
STRATEGIES: dict[str, Callable[[DemoConfig, Teachers, int], Strategy]] = {
    "CE only": lambda config, teachers, features: HardLabels(),
    "AVER": lambda config, teachers, features: LogitDistillation(teachers, "uniform", config.alpha),
    "CA-MKD": lambda config, teachers, features: CAMKD(teachers, features, config.alpha, config.beta),
}


def train_students(
    name: str,
    config: DemoConfig,
    teachers: Teachers,
    train: LabelledImages,
    data: DigitSplits,
    progress: Progress,
) -> StudentResult:
    """The same student from every seed, which fixes its first parameters and the order of the images."""
    histories, test_accuracy = [], []
    for seed in config.seeds:
        student = seeded_model(config.student, train, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            strategy = STRATEGIES[name](config, teachers, feature_model(student).num_features)
        settings = TrainConfig(config.student_epochs, seed, config.batch_size, shift=0)
        on_epoch = progress.run(f"{name}, seed {seed}", len(train))
        histories.append(fit(student, strategy, train, data.validation, settings, on_epoch))
        test_accuracy.append(accuracy(student, data.test))
    return StudentResult(name, test_accuracy, histories)


@one_thread()
def train_all(config: DemoConfig) -> tuple[list[TeacherResult], list[StudentResult], Tensor]:
    """Every model, one after the other, and the confidence weights (K, N) on the students' images."""
    data = load_digits()
    few = first_images(data.train, config.student_images)
    teacher_images = sum(spec.epochs * (spec.images or len(data.train)) for spec in config.teachers)
    student_images = len(STRATEGIES) * len(config.seeds) * config.student_epochs * len(few)
    progress = Progress(teacher_images + student_images)

    trained, teacher_results = [], []
    for seed, spec in enumerate(config.teachers):
        model, history = train_teacher(spec, seed, config.batch_size, data, progress)
        trained.append(model)
        teacher_results.append(TeacherResult(spec, accuracy(model, data.test), history))
    teachers = Teachers(trained)
    students = [train_students(name, config, teachers, few, data, progress) for name in STRATEGIES]
    progress.close()
    logits = [taught.logits for taught in teachers(few.normalise(few.pixels))]
    weights, _ = confidence_weights(logits, few.labels)
    return teacher_results, students, weights


def run(config: DemoConfig) -> DemoResults:
    """Train everything, then time the loss on all threads."""
    teachers, students, weights = train_all(config)
    speed = measure_loss_speed(*config.speed_shape, compiled=config.compiled)
    return DemoResults(config, (TRAIN, VALIDATION, TEST), teachers, students, weights, speed)
