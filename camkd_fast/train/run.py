"""The jobs: teach a model, distill a student, evaluate what came out. Each writes or reads a run folder."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import models
from ..data import catalogue, choose
from ..data.augment import Augmentation
from ..data.batch import Loader, LoaderConfig
from ..data.files import ImageSet
from ..data.images import corrupt_labels, stratified_parts, swap_labels
from ..data.splits import Splits
from ..models.protocol import feature_model
from . import config_file, run_folder, strategies
from .atomic import write_atomically
from .checkpoint import Checkpoints, model_bytes
from .config import DataConfig, DistillConfig, JobConfig, PrecisionConfig, TeachConfig
from .distributed import World, processes, share_of_batch
from .journal import METRICS, Journal, Silence, read_metrics
from .run_folder import CHECKPOINTS, CONFIG, MODEL, is_finished, load_model
from .schedule import peak_rate
from .step import TrainStep
from .teachers.live import Teachers
from .teachers.runs import load_teachers
from .trainer import Evaluation, Trainer
from .trainer import evaluate as evaluate_model

EVALUATION_BATCH = 256  # images per process
LARGEST_CROPPED = 64  # pixels a side, up to which images are shifted rather than resized at random


@dataclass(frozen=True)
class RunResult:
    """What a finished run says; all else is in its metrics.jsonl."""

    out: Path
    test: Evaluation  # the last epoch's model, on the only look at the test images
    images_per_second: float  # training, over all processes, in the process that finished the run
    start_seconds: float  # its first steps, compilation included
    seconds: float  # of that process, everything included


def teach(config: TeachConfig, *, resume: bool = False, overwrite: bool = False) -> RunResult:
    """Train a model on labels, by one process or by as many as torchrun starts; all of them must see `config.out`.

    Args:
        resume: go on from the last intact checkpoint in `config.out`, if there is one.
        overwrite: remove a run that is there.

    Raises:
        RunExistsError: `config.out` holds a run, and neither was asked for.
        NonFiniteLossError: training diverged.
        CheckpointError: every checkpoint is damaged.
        ValueError, OSError: an unfit setting or file, named.
    """
    return _run(config, config.model, resume, overwrite)


def distill(config: DistillConfig, *, resume: bool = False, overwrite: bool = False) -> RunResult:
    """Train a student from labels and the teachers that `teach` left; arguments and errors as `teach`."""
    return _run(config, config.student, resume, overwrite)


def evaluate(run: Path, split: str = "test", device: str = "auto") -> Evaluation:
    """The model of a finished run on the "train", "validation" or "test" images of its own data set, unaugmented.

    Raises:
        ValueError: an unknown split, or one without images.
        FileNotFoundError, CheckpointError, OSError: as `load_model`.
    """
    if split not in Splits._fields:
        raise ValueError(f"split must be one of {', '.join(Splits._fields)}, got {split!r}")
    model = load_model(run)
    config = config_file.load(run / CONFIG)
    images: ImageSet = getattr(load_splits(config.data), split)
    if not len(images):
        raise ValueError(f"the {split} part of {config.data.data} is empty")
    with processes(device) as world:
        settings = _loader_config(config, world, EVALUATION_BATCH, None)
        with closing(choose.loader(images, settings, config.data.loader)) as loader:
            return evaluate_model(model.to(world.device), loader, world)


def _run(config: JobConfig, model: str, resume: bool, overwrite: bool) -> RunResult:
    """Both jobs: they differ in the training images' labels and in who teaches."""
    started = time.perf_counter()
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other, but both were asked for")
    with processes(config.precision.device) as world, _repeatable(config.precision, world.device):
        if world.is_main:
            run_folder.check_free(config, resume, overwrite)
        if world.broadcast(resume and is_finished(config.out)):
            return _result(config.out)
        return _train(config, model, resume, world, started)


def _train(config: JobConfig, model: str, resume: bool, world: World, started: float) -> RunResult:
    """`started`: reading of time.perf_counter when the job began."""
    with ExitStack() as stack:
        parts = load_splits(config.data)
        train, settings = training_set(config, parts.train, world)
        teachers = load_teachers(config, train, settings, world) if isinstance(config, DistillConfig) else None
        torch.manual_seed(config.seed)
        student = models.create(model, train.num_classes, train.channels)
        strategy = make_strategy(config, teachers, feature_model(student).num_features)
        step = TrainStep(
            student, strategy, teachers, config.optim, config.precision, world, settings.batch_size, config.seed
        )

        def loader(images: ImageSet, settings: LoaderConfig) -> Loader:
            return stack.enter_context(closing(choose.loader(images, settings, config.data.loader)))

        still = _loader_config(config, world, EVALUATION_BATCH, None)
        trainer = Trainer(
            step,
            loader(train, settings),
            loader(parts.validation, still) if len(parts.validation) else None,
            len(train),
            config.optim,
            peak_rate(config.optim, model),
            config.log,
            Checkpoints(config.out / CHECKPOINTS),
            _metadata(model, config.data.data, train),
            world,
        )
        if world.is_main:
            run_folder.prepare(config, resume)
        world.wait()  # until the folder holds this run and no other
        checkpoint = trainer.checkpoints.latest()
        if checkpoint is not None:
            trainer.resume(checkpoint)
        journal: Journal | Silence = Silence()
        if world.is_main:
            title = f"{model} on {config.data.data}"
            journal = Journal(config.out, config.log, trainer.steps, trainer.position, title)
        stack.enter_context(closing(journal))
        if config.data.loader == "auto":
            journal.say(f"loader {choose.explain(train, settings)}")
        outcome = trainer.run(journal)

        world.copy_buffers(step.student)
        test = evaluate_model(step.student, loader(parts.test, still), world)
        speed, start = outcome
        result = RunResult(config.out, test, speed, start, time.perf_counter() - started)
        if world.is_main:
            journal.write(_record(result, trainer.position, config.optim.epochs))
            write_atomically(config.out / MODEL, model_bytes(step.student, trainer.metadata))
        world.wait()
        return result


def _record(result: RunResult, step: int, epoch: int) -> dict[str, Any]:
    """The last line of metrics.jsonl."""
    return {
        "kind": "test",
        "step": step,
        "epoch": epoch,
        "test_images": result.test.images,
        "test_accuracy": result.test.accuracy,
        "test_loss": result.test.loss,
        "test_calibration": result.test.calibration,
        "images_per_second": result.images_per_second,
        "start_seconds": result.start_seconds,
        "seconds": result.seconds,
    }


def _result(out: Path) -> RunResult:
    """Of a finished run."""
    record = read_metrics(out / METRICS, "test")[-1]
    calibration = record.get("test_calibration", math.nan)  # runs of earlier versions have none
    test = Evaluation(record["test_images"], record["test_accuracy"], record["test_loss"], calibration)
    return RunResult(out, test, record["images_per_second"], record["start_seconds"], record["seconds"])


# --- images ----------------------------------------------------------------------------------------------------------


def load_splits(config: DataConfig) -> Splits:
    """The data set's three parts; errors as `catalogue.load`."""
    return catalogue.load(
        config.data, config.root, split_seed=config.split_seed, validation=config.validation, size=config.size
    )


def training_set(config: JobConfig, train: ImageSet, world: World) -> tuple[ImageSet, LoaderConfig]:
    """What a run trains on: its share of the training part, its labels as configured; and how they are to be loaded."""
    images = _training_images(config, train)
    share = share_of_batch(config.optim.batch_size, world)
    return images, _loader_config(config, world, share, training_augmentation(config.data, images))


def _training_images(config: JobConfig, train: ImageSet) -> ImageSet:
    """As many as configured, every class in proportion, and with as many wrong labels."""
    if config.data.images is not None:
        (kept,) = stratified_parts(train.labels, [config.data.images], config.data.split_seed)
        train = train.take(kept)
    if isinstance(config, TeachConfig) and config.wrong_labels:
        labels = corrupt_labels(train.labels, train.num_classes, config.wrong_labels, config.seed)
        train = replace(train, labels=labels)
    if isinstance(config, TeachConfig) and config.swapped:
        train = replace(train, labels=swap_labels(train.labels, train.num_classes, *config.swapped))
    return train


def training_augmentation(config: DataConfig, images: ImageSet) -> Augmentation:
    """The one that the config names; "auto" goes by the images' size."""
    side = max(images.shape[1:])
    kind = config.augmentation
    if kind == "auto":
        kind = "crop" if side <= LARGEST_CROPPED else "resized-crop"
    if kind == "none":
        return Augmentation(padding=0, flip=False)
    flip = config.data != "digits" if config.flip is None else config.flip
    padding = side // 8 if config.padding is None else config.padding
    return Augmentation(kind, padding if kind == "crop" else 0, flip)


def _loader_config(config: JobConfig, world: World, batch_size: int, augmentation: Augmentation | None) -> LoaderConfig:
    return LoaderConfig(
        batch_size=batch_size,
        seed=config.seed,
        augmentation=augmentation,
        view_seed=config.data.view_seed,
        views=config.data.views,
        rank=world.rank,
        world=world.size,
        workers=config.data.workers,
        device=world.device,
        channels_last=config.precision.channels_last,
        skip_bad=config.data.skip_bad,
    )


def make_strategy(config: JobConfig, teachers: Teachers | None, num_features: int) -> strategies.Strategy:
    if isinstance(config, TeachConfig):
        return strategies.create(strategies.CE.name, None, num_features)
    return strategies.create(
        config.strategy,
        teachers,
        num_features,
        alpha=config.alpha,
        beta=config.beta,
        temperature=config.temperature,
        official_scale=config.official_scale,
        teacher_index=config.teacher_index,
        detach_weights=config.detach,
        uniform=config.uniform,
    )


def _metadata(model: str, data: str, images: ImageSet) -> dict[str, Any]:
    """What a model file says about its model."""
    return {
        "model": model,
        "num_classes": images.num_classes,
        "in_channels": images.channels,
        "data": data,
        "size": images.shape[1:],
        "mean": images.mean,
        "std": images.std,
    }


@contextmanager
def _repeatable(precision: PrecisionConfig, device: torch.device) -> Iterator[None]:
    """Random numbers of the caller are left alone, and algorithms are those that repeat bit for bit where asked for."""
    wanted = precision.deterministic == "on" or (precision.deterministic == "auto" and device.type == "cpu")
    already = torch.are_deterministic_algorithms_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if wanted and not already:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            memory.fill_uninitialized_memory = False  # costs a pass over every new tensor
            torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            memory.fill_uninitialized_memory = filled
            torch.use_deterministic_algorithms(already)
