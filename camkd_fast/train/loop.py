"""One step, one loop. Neither knows any strategy's name."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..data import LabelledImages, ResidentBatches
from ..models.protocol import FeatureModel, feature_model, predict
from .config import TrainConfig
from .strategies import Strategy


class NonFiniteLossError(RuntimeError):
    """Training diverged."""


@dataclass
class EpochSums:
    """Sums over the batches of one epoch, kept on the device: reading them costs a synchronisation."""

    loss: Tensor | float = 0.0  # times images
    correct: Tensor | int = 0
    weights: Tensor | float = 0.0  # (K,)
    feature_weights: Tensor | float = 0.0  # (K,)
    images: int = 0


@dataclass(frozen=True)
class EpochRecord:
    """Means over one epoch."""

    epoch: int  # from 1
    loss: float
    train_accuracy: float  # on augmented images, while the model was changing
    validation_accuracy: float
    weights: list[float]  # mean weight per teacher; empty where the strategy has none
    feature_weights: list[float]


@dataclass
class History:
    """What one training run left behind."""

    epochs: list[EpochRecord] = field(default_factory=list)
    seconds: float = 0.0  # in training steps, evaluation excluded
    images: int = 0  # processed in those seconds

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds


def train_step(
    student: FeatureModel,
    strategy: Strategy,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    target: Tensor,
    sums: EpochSums,
) -> None:
    """One update on one batch, which student and teachers share. No host synchronisation."""
    taught = strategy.teachers(images) if strategy.teachers is not None else []
    prediction = predict(student, images)
    objective = strategy(prediction, taught, target)
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(objective.loss)
    optimizer.step()

    n = target.numel()
    sums.images += n
    sums.loss = sums.loss + objective.loss.detach() * n
    sums.correct = sums.correct + (prediction.logits.detach().argmax(1) == target).sum()
    if objective.weights is not None:
        sums.weights = sums.weights + objective.weights.sum(1)
    if objective.feature_weights is not None:
        sums.feature_weights = sums.feature_weights + objective.feature_weights.sum(1)


def fit(
    student: nn.Module,
    strategy: Strategy,
    train: LabelledImages,
    validation: LabelledImages,
    config: TrainConfig,
    on_epoch: Callable[[EpochRecord], None] = lambda record: None,
) -> History:
    """Train `student` in place and leave it in evaluation mode after the last epoch (no epoch is selected).

    Raises:
        TypeError: the student does not follow the protocol of `camkd_fast.models.protocol`.
        NonFiniteLossError: an epoch's mean loss is NaN or infinite.
    """
    model = feature_model(student)
    batches = ResidentBatches(train, config.batch_size, config.seed, config.shift)
    parameters = [*student.parameters(), *strategy.parameters()]
    optimizer = torch.optim.SGD(
        parameters,
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=True,
        fused=True,
    )
    steps = config.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    history = History()
    for epoch in range(1, config.epochs + 1):
        batches.set_epoch(epoch)
        student.train()
        strategy.train()
        sums = EpochSums()
        started = time.perf_counter()
        for images, target in batches:
            train_step(model, strategy, optimizer, images, target, sums)
            schedule.step()
        loss = float(sums.loss) / sums.images
        history.seconds += time.perf_counter() - started
        history.images += sums.images
        if not math.isfinite(loss):
            raise NonFiniteLossError(f"the loss of epoch {epoch} is {loss} (learning rate {config.learning_rate})")
        record = EpochRecord(
            epoch,
            loss,
            float(sums.correct) / sums.images,
            accuracy(student, validation),
            _per_image(sums.weights, sums.images),
            _per_image(sums.feature_weights, sums.images),
        )
        history.epochs.append(record)
        on_epoch(record)
    return history


def _per_image(total: Tensor | float, images: int) -> list[float]:
    return [value / images for value in total.tolist()] if isinstance(total, Tensor) else []


@torch.no_grad()
def accuracy(model: nn.Module, data: LabelledImages, batch_size: int = 512) -> float:
    """Share of `data` that `model` classifies right; leaves the model in evaluation mode."""
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=data.labels.device)
    for pixels, labels in zip(torch.split(data.pixels, batch_size), torch.split(data.labels, batch_size), strict=True):
        correct += (model(data.normalise(pixels)).argmax(1) == labels).sum()
    return int(correct) / len(data)
