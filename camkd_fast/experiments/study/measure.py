"""Measurements of a study on models and teacher weights, in addition to the runs' own metrics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...data import choose
from ...data.batch import LoaderConfig
from ...data.files import ImageSet
from ...losses.formula import Formula
from ...losses.logit import camkd_loss
from ...models.protocol import feature_model, predict
from ...train import run
from ...train.checkpoint import Checkpoints
from ...train.config import DistillConfig
from ...train.confusion import confusion
from ...train.distributed import World, processes
from ...train.run_folder import CHECKPOINTS, load_model
from ...train.run_images import EVALUATION_BATCH, load_splits, training_set
from ...train.teachers.cache import CachedTeachers
from ...train.teachers.runs import load_teachers
from ...train.trainer import evaluate
from .spec import StudyConfig

DIGITS = 5  # decimals of stored weights


def scaled(model: nn.Module, factor: float) -> nn.Module:
    """Multiply the model's last linear layer, and so its logits, by `factor`, in place.

    Raises:
        ValueError: the logits do not come from a linear layer.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers or layers[-1].out_features != model.num_classes:
        raise ValueError(f"{type(model).__name__} does not end with a linear layer whose logits could be scaled")
    with torch.no_grad():
        for parameter in layers[-1].parameters():
            parameter.mul_(factor)
    return model


def teacher(folder: Path, study: StudyConfig) -> dict[str, Any]:
    """Accuracy and calibration of a trained teacher."""
    model = load_model(folder)
    parts = load_splits(study.data)
    with processes(study.precision.device) as world:
        model.to(world.device)
        validation = _evaluate(model, parts.validation, study, world)
        test = _evaluate(model, parts.test, study, world)
        by_class = confusion([model], parts.test, study.data.loader).shares(0)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "validation_accuracy": validation.accuracy,
        "test_accuracy": test.accuracy,
        "test_loss": test.loss,
        "test_calibration": test.calibration,
        "class_accuracy": [round(row[c], DIGITS) for c, row in enumerate(by_class)],
    }


def _evaluate(model: nn.Module, images: ImageSet, study: StudyConfig, world: World) -> Any:
    settings = LoaderConfig(EVALUATION_BATCH, device=world.device, channels_last=study.precision.channels_last)
    with closing(choose.loader(images, settings, study.data.loader)) as loader:
        return evaluate(model, loader, world)


def pool(config: DistillConfig) -> dict[str, Any]:
    """Confidence and entropy weights of a run's teachers by class, from their cache, which is written if missing.

    These weights depend only on teachers and labels, so they are the same for every run from this pool.

    Returns:
        "confidence" and "entropy": K rows of C means over the training images of a class in view 0, summing to 1 over
        the teachers; "confidence_spread": K standard deviations of the confidence weight over images.
    """
    with _cached_teachers(config) as (images, teachers, _):
        logits = [t.logits.float() for t in teachers.cache.outputs(0, torch.arange(len(images)))]
        labels = images.labels.to(logits[0].device)
        found: dict[str, Any] = {}
        for rule in ("confidence", "entropy"):
            student = torch.zeros_like(logits[0])
            weights = camkd_loss(student, logits, labels, **Formula(weighting=rule).options()).weights
            weights = weights / weights.sum(0)  # entropy weights sum to K - 1
            found[rule] = _by_class(weights, labels, images.num_classes)
            if rule == "confidence":
                found["confidence_spread"] = [round(value, DIGITS) for value in weights.std(1).tolist()]
    return found


@torch.no_grad()
def class_feature_weights(config: DistillConfig) -> list[list[float]] | None:
    """Feature weights of a trained student by class: (K, C) means over the images of view 0.

    Needs the run's last checkpoint, which has the maps r_k. None if the strategy gives all maps equal weights.
    """
    with _cached_teachers(config) as (images, teachers, settings):
        student = load_model(config.out).to(settings.device)
        strategy = run.make_strategy(config, teachers, feature_model(student).num_features).to(settings.device)
        checkpoint = Checkpoints(config.out / CHECKPOINTS).latest()
        if checkpoint is None:
            raise FileNotFoundError(f"{config.out} has no checkpoint, which has the maps r_k")
        strategy.load_state_dict(checkpoint.state["training"]["strategy"])
        strategy.eval()
        weights, labels = [], []
        with closing(choose.loader(images, settings, config.data.loader)) as loader:
            for batch in loader:
                output = predict(feature_model(student), batch.images)
                term = strategy.feature_term(output, teachers(batch), batch.target)
                if term is None or term.weights is None:
                    return None
                weights.append(term.weights)
                labels.append(batch.target)
    return _by_class(torch.cat(weights, 1), torch.cat(labels), images.num_classes)


@contextmanager
def _cached_teachers(config: DistillConfig) -> Iterator[tuple[ImageSet, CachedTeachers, LoaderConfig]]:
    """A run's training images, its cached teachers and its loader settings."""
    with processes(config.precision.device) as world, torch.random.fork_rng():
        images, settings = training_set(config, load_splits(config.data).train, world)
        teachers = load_teachers(config, images, settings, world)
        if not isinstance(teachers, CachedTeachers):
            raise ValueError(f"{config.strategy} replays no teacher cache")
        yield images, teachers, settings


def _by_class(weights: Tensor, labels: Tensor, C: int) -> list[list[float]]:
    """Means (K, C) of weights (K, N) over the images of each class; 0 for classes without images."""
    sums = torch.zeros(len(weights), C, dtype=torch.float64, device=weights.device)
    sums.index_add_(1, labels, weights.double())
    counts = torch.bincount(labels, minlength=C).clamp(min=1)
    return [[round(value, DIGITS) for value in row] for row in (sums / counts).tolist()]
