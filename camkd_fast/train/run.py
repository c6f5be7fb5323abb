"""The jobs: train a teacher, distill a student, evaluate a run. Each writes or reads a run folder."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..data import choose
from ..data.batch import Loader, LoaderConfig
from ..data.files import ImageSet
from ..data.order import step_sizes
from ..data.splits import Splits
from ..models.model_file import AVERAGED_MODEL, MODEL, model_bytes
from ..models.protocol import feature_model
from . import config_file, folder_lock, run_folder, run_teachers, strategies
from .atomic import write_atomically
from .checkpoint import Checkpoints
from .class_names import renumbered
from .config import DistillConfig, JobConfig, PrecisionConfig, TeachConfig
from .distributed import World, processes
from .initial_weights import first_model
from .journal import METRICS, Journal, NullJournal, result_record
from .run_folder import CHECKPOINTS, CONFIG, RunExistsError, is_finished, load_model
from .run_images import EVALUATION_BATCH, load_splits, loader_config, training_set, unreadable
from .schedule import peak_rate
from .step import TrainStep
from .teachers.live import Teachers
from .teachers.runs import load_teachers
from .trainer import Evaluation, Outcome, Trainer, check_finite, evaluate_average
from .trainer import evaluate as evaluate_model


@dataclass(frozen=True)
class RunResult:
    """Results of a finished run; its metrics.jsonl has the rest."""

    out: Path
    test: Evaluation  # of the last epoch's model; test images are used only here
    images_per_second: float  # training, over all processes, since the last resume
    start_seconds: float  # first steps since the last resume, compilation included
    seconds: float  # wall time since the last resume, everything included
    averaged: Evaluation | None = None  # likewise of the average, if the run has one


def teach(config: TeachConfig, *, resume: bool = False, overwrite: bool = False, extend: bool = False) -> RunResult:
    """Train a model on labels, in one process or in those that torchrun starts; all of them must see `config.out`.

    Args:
        resume: continue from the last intact checkpoint in `config.out`, if there is one. The number of epochs may
            differ if the learning rates so far do not depend on it: the run ends as one that had it from the start.
        overwrite: remove an existing run.
        extend: with `resume`, the number of epochs may differ in any case.

    Raises:
        RunExistsError: `config.out` holds a run, and neither `resume` nor `overwrite` is set or fits.
        FolderLockedError: another process trains in `config.out`.
        NonFiniteLossError: training diverged.
        CheckpointError: every checkpoint is damaged.
        ValueError, OSError: an invalid setting or file, named in the message.
    """
    return _run(config, config.model, resume, overwrite, extend)


def distill(
    config: DistillConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    extend: bool = False,
    compared: Sequence[Path] = (),
) -> RunResult:
    """Train a student from labels and from the runs of its teachers; other arguments and errors as `teach`.

    The hashes of the teachers, which take about a second per GB of weights, are kept in the run folder
    (`run_teachers`).

    Args:
        compared: folders of runs whose results are compared with this one's.

    Raises:
        RunExistsError: also if the run to resume, or one of `compared`, has learned from a teacher that has changed.
    """
    return _run(config, config.student, resume, overwrite, extend, compared)


def evaluate(run: Path, split: str = "test", device: str = "auto") -> Evaluation:
    """Evaluate the model of a finished run on a split of its data set, unaugmented.

    Args:
        run: its folder, or a model file in it.
        split: "train", "validation" or "test".

    Raises:
        ValueError: an unknown or empty split, or images of other classes than the model's.
        FileNotFoundError, CheckpointError, OSError: as `load_model`.
    """
    if split not in Splits._fields:
        raise ValueError(f"split must be one of {', '.join(Splits._fields)}, got {split!r}")
    model = load_model(run)
    config = config_file.load(run_folder.folder_of(run) / CONFIG)
    images: ImageSet = getattr(load_splits(config.data), split)
    model = renumbered(model, f"the model of {run}", run_folder.model_metadata(run), images)
    if not len(images):
        raise ValueError(f"the {split} part of {config.data.data} is empty")
    with processes(device) as world:
        settings = loader_config(config, world, EVALUATION_BATCH, None)
        with closing(choose.loader(images, settings, config.data.loader)) as loader:
            return evaluate_model(model.to(world.device), loader, world)


def _run(
    config: JobConfig, model: str, resume: bool, overwrite: bool, extend: bool, compared: Sequence[Path] = ()
) -> RunResult:
    """Common part of `teach` and `distill`."""
    started = time.perf_counter()
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other, but both are set")
    if extend and not resume:
        raise ValueError("extend needs resume, which is not set")
    with ExitStack() as stack:
        world = stack.enter_context(processes(config.precision.device))
        stack.enter_context(_repeatable(config.precision, world.device))

        def lock() -> bool:
            """Lock the run's folder and check it; whether the run is done."""
            stack.enter_context(folder_lock.locked(config.out))
            run_folder.check_unused(config, resume, overwrite)
            return resume and run_folder.is_done(config)

        if world.on_main(lock):
            return _result(config.out)
        return _train(config, model, resume, extend, compared, world, started)


def _train(
    config: JobConfig,
    model: str,
    resume: bool,
    extend: bool,
    compared: Sequence[Path],
    world: World,
    started: float,
) -> RunResult:
    """`started`: time.perf_counter() at the start of the job."""
    with ExitStack() as stack:
        parts = load_splits(config.data)
        train, settings = training_set(config, parts.train, world)
        steps = config.optim.epochs * len(step_sizes(len(train), settings.batch_size, world.size, shuffle=True))
        precision = config.precision.for_run(world.device.type, steps)
        bad = unreadable(parts._replace(train=train), config.data.skip_bad, world)
        settings = replace(settings, known_bad=bad.train)
        teachers = None
        if isinstance(config, DistillConfig):
            teachers = load_teachers(replace(config, precision=precision), train, settings, world)
        student, origin = first_model(config, model, train, resume, world)
        strategy = make_strategy(config, teachers, feature_model(student).num_features)
        step = TrainStep(student, strategy, teachers, config.optim, precision, world, settings.batch_size, config.seed)

        def loader(images: ImageSet, settings: LoaderConfig) -> Loader:
            return stack.enter_context(closing(choose.loader(images, settings, config.data.loader)))

        for_evaluation = loader_config(config, world, EVALUATION_BATCH, None)
        for_validation = replace(for_evaluation, known_bad=bad.validation)
        for_test = replace(for_evaluation, known_bad=bad.test)
        trainer = Trainer(
            step,
            loader(train, replace(settings, deferred=step.replays)),
            loader(parts.validation, for_validation) if len(parts.validation) else None,
            len(train),
            config.optim,
            peak_rate(config.optim, model),
            config.log,
            Checkpoints(config.out / CHECKPOINTS),
            _metadata(model, config.data.data, train),
            world,
        )
        known = _known(config, teachers, world)
        world.on_main(lambda: run_teachers.check_compared(config.out, known, compared))
        extended = _start(config, trainer, known, resume, extend)
        journal: Journal | NullJournal = NullJournal()
        if world.is_main:
            title = f"{model} on {config.data.data}"
            journal = Journal(config.out, config.log, trainer.steps, trainer.position, title)
        stack.enter_context(closing(journal))
        for record in filter(None, (origin, extended)):
            journal.write(record)
        if config.data.loader == "auto":
            journal.note(f"loader {choose.explain(train, settings)}")
        outcome = trainer.run(journal)
        return _finish(config, trainer, outcome, loader(parts.test, for_test), journal, started)


def _finish(
    config: JobConfig,
    trainer: Trainer,
    outcome: Outcome,
    images: Loader,
    journal: Journal | NullJournal,
    started: float,
) -> RunResult:
    """Evaluate the trained model on the test images, write the result and then the model."""
    step, world = trainer.step, trainer.world
    world.copy_buffers(step.student)
    test = evaluate_model(step.student, images, world)
    # With no images held out, the first to see that the last steps diverged
    check_finite("test loss", test, trainer.position)
    averaged = evaluate_average(step, images, world)
    if averaged is not None:
        check_finite("test loss of the average", averaged, trainer.position)
    result = RunResult(config.out, test, *outcome, time.perf_counter() - started, averaged)
    if world.is_main:
        journal.write(_record(result, trainer.position, config.optim.epochs))
        if step.average is not None:
            write_atomically(config.out / AVERAGED_MODEL, model_bytes(step.average.module, trainer.metadata))
        write_atomically(config.out / MODEL, model_bytes(step.student, trainer.metadata))
    world.wait()
    return result


def _known(config: JobConfig, teachers: Teachers | None, world: World) -> run_teachers.Teachers:
    """Sources and hashes of the teachers; a cache has computed them already."""
    if teachers is None or not isinstance(config, DistillConfig):
        return []
    return run_teachers.agreed(config.teachers, teachers.hashes, world)


def _start(
    config: JobConfig, trainer: Trainer, teachers: run_teachers.Teachers, resume: bool, extend: bool
) -> dict[str, Any]:
    """Prepare the run folder, and restore the last checkpoint when resuming.

    Args:
        teachers: sources and hashes.

    Returns:
        A record for metrics.jsonl if completed steps had the learning rates of other epochs; else an empty one.
    """
    # Without a config what is there is no run, and rank 0 removes it before it writes one.
    goes_on = resume and (config.out / CONFIG).exists()
    checkpoint = trainer.checkpoints.latest() if goes_on else None

    def prepare() -> dict[str, Any]:
        extended: dict[str, Any] = {}
        before = run_folder.epochs_before(config) if resume else None
        if goes_on:
            run_teachers.check_resumed(config.out, teachers)
        if before is not None:
            if checkpoint is None and is_finished(config.out):
                raise RunExistsError(f"{config.out} has no checkpoint from which to go on: --overwrite starts again")
            completed = 0 if checkpoint is None else checkpoint.step
            steps = trainer.steps_per_epoch
            if run_folder.check_extension(config, before, completed, steps, trainer.peak, extend):
                epochs = {"epochs": config.optim.epochs, "epochs_before": before}
                extended = {"kind": "extended", "step": completed, "epoch": -(-completed // steps), **epochs}
        run_folder.prepare(config, resume)
        run_teachers.write(config.out, teachers, anew=checkpoint is None)
        return extended

    extended = trainer.world.on_main(prepare)
    if checkpoint is not None:
        trainer.resume(checkpoint)
    return extended


def _record(result: RunResult, step: int, epoch: int) -> dict[str, Any]:
    """The last record of metrics.jsonl."""
    return {
        "kind": "test",
        "step": step,
        "epoch": epoch,
        **_named("test", result.test),
        **({} if result.averaged is None else _named("ema_test", result.averaged)),
        "images_per_second": result.images_per_second,
        "start_seconds": result.start_seconds,
        "seconds": result.seconds,
    }


def _result(out: Path) -> RunResult:
    """The result of a finished run, from its metrics."""
    record = result_record(out / METRICS)
    averaged = _evaluation("ema_test", record) if "ema_test_images" in record else None
    timing = record["images_per_second"], record["start_seconds"], record["seconds"]
    return RunResult(out, _evaluation("test", record), *timing, averaged)


def _named(prefix: str, evaluation: Evaluation) -> dict[str, Any]:
    return {f"{prefix}_{name}": value for name, value in evaluation._asdict().items()}


def _evaluation(prefix: str, record: dict[str, Any]) -> Evaluation:
    calibration = record.get(f"{prefix}_calibration", math.nan)  # missing in runs of earlier versions
    images, accuracy, loss = (record[f"{prefix}_{name}"] for name in ("images", "accuracy", "loss"))
    return Evaluation(images, accuracy, loss, calibration)


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
    """Metadata of a model file."""
    return {
        "model": model,
        "num_classes": images.num_classes,
        "class_names": images.class_names,
        "in_channels": images.channels,
        "data": data,
        "size": images.shape[1:],
        "mean": images.mean,
        "std": images.std,
    }


@contextmanager
def _repeatable(precision: PrecisionConfig, device: torch.device) -> Iterator[None]:
    """Deterministic algorithms if the config says so, else cuDNN's fastest; restores the caller's settings and random
    state.
    """
    wanted = precision.deterministic == "on" or (precision.deterministic == "auto" and device.type == "cpu")
    already = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled, measured = memory.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if wanted and not already:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            memory.fill_uninitialized_memory = False  # costs a pass over every new tensor
            torch.use_deterministic_algorithms(True)
        # cuDNN measures its algorithms once per shape; which one is fastest may change from run to run.
        torch.backends.cudnn.benchmark = device.type == "cuda" and not (wanted or already)
        try:
            yield
        finally:
            memory.fill_uninitialized_memory, torch.backends.cudnn.benchmark = filled, measured
            torch.use_deterministic_algorithms(already, warn_only=warns)
