"""The training loop: epochs of steps, evaluation, log records and checkpoints."""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.batch import Loader
from ..data.order import step_sizes
from ..models.model_file import model_bytes
from .checkpoint import Checkpoint, Checkpoints
from .config import LogConfig, OptimConfig
from .distributed import World
from .journal import Journal, NullJournal
from .schedule import learning_rate
from .step import TrainStep
from .sums import NonFiniteLossError, Totals
from .teacher_ahead import with_following


class Evaluation(NamedTuple):
    """Metrics of a model on a set of images, each image counted once."""

    images: int
    accuracy: float
    loss: float  # mean cross-entropy
    calibration: float  # expected calibration error, see `calibration_error`


BINS = 15  # bins of the calibration error


def calibration_bins(logits: Tensor, correct: Tensor) -> Tensor:
    """Per bin, the sum of confidences and the number of correct predictions.

    The confidence of a prediction is its largest probability; bin b covers (b / BINS, (b + 1) / BINS].

    Args:
        logits: (n, C).
        correct: (n,) bool.

    Returns:
        (2, BINS) float64.
    """
    confidence = logits.float().softmax(1).amax(1).double()
    place = ((confidence * BINS).ceil().long() - 1).clamp(0, BINS - 1)
    bins = torch.zeros(2, BINS, dtype=torch.float64, device=logits.device)
    for row, values in zip(bins, (confidence, correct.double()), strict=True):
        row.index_put_((place,), values, accumulate=True)
    return bins


def calibration_error(bins: Tensor, images: int) -> float:
    """sum_b (n_b / N) |accuracy_b - mean confidence_b| (Guo et al. 2017), from the summed `calibration_bins`."""
    return float((bins[0] - bins[1]).abs().sum()) / max(images, 1)


@torch.no_grad()
def evaluate(model: nn.Module, loader: Loader, world: World) -> Evaluation:
    """Evaluate in float32 over all processes; leaves the model in evaluation mode.

    Args:
        loader: this process's part of the images, in evaluation order.
    """
    model.eval()
    sums = torch.zeros(3 + 2 * BINS, dtype=torch.float64, device=world.device)
    for batch in loader:
        logits = model(batch.images)
        loss = F.cross_entropy(logits, batch.target, reduction="sum")
        correct = logits.argmax(1) == batch.target
        counts = torch.stack([torch.full_like(loss, batch.target.numel()), correct.sum().to(loss.dtype), loss])
        sums += torch.cat([counts, calibration_bins(logits, correct).view(-1)])
    totals = world.sum(sums)
    images, correct_total, loss_total = totals[:3].tolist()
    error = calibration_error(totals[3:].view(2, BINS), int(images))
    return Evaluation(int(images), correct_total / max(images, 1), loss_total / max(images, 1), error)


def evaluate_average(step: TrainStep, loader: Loader, world: World) -> Evaluation | None:
    """Evaluate the average of a step's student, as `evaluate` does; None if there is no average."""
    if step.average is None:
        return None
    world.copy_buffers(step.average.module)
    return evaluate(step.average.module, loader, world)


def check_finite(name: str, evaluation: Evaluation, step: int) -> None:
    """Check the loss of a model that has been trained for `step` steps.

    Raises:
        NonFiniteLossError: it is infinite or NaN.
    """
    if not math.isfinite(evaluation.loss):
        raise NonFiniteLossError(f"the {name} is {evaluation.loss} after step {step}")


class Clock:
    """Throughput of this process. The first steps, which compile, allocate and start workers, are timed separately.

    Args:
        device: synchronised once, after the first steps.
        first: number of first steps.
    """

    def __init__(self, device: torch.device, first: int) -> None:
        self._device, self._first = device, first
        self.start_seconds = self.seconds = 0.0  # of the first steps, of all later ones
        self.images = 0  # of the later steps
        self._lap = (0.0, 0)
        self._started = 0.0

    def go(self) -> None:
        self._started = time.perf_counter()

    def count(self, images: int) -> None:
        """Count one issued step."""
        if self._first == 0:
            self.images += images
            return
        self._first -= 1
        if self._first == 0:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.start_seconds, self._started = self._since_go(self.start_seconds)

    def pause(self) -> None:
        """Stop until `go`; the device must be idle."""
        if self._first:
            self.start_seconds, _ = self._since_go(self.start_seconds)
        else:
            self.seconds, _ = self._since_go(self.seconds)

    def _since_go(self, total: float) -> tuple[float, float]:
        now = time.perf_counter()
        return total + now - self._started, now

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    def lap(self) -> float:
        """Images per second since the last lap."""
        seconds, images = self.seconds - self._lap[0], self.images - self._lap[1]
        self._lap = self.seconds, self.images
        return images / seconds if seconds else 0.0


class Outcome(NamedTuple):
    """Timing of a finished run."""

    images_per_second: float  # over all processes, without first steps and evaluation
    start_seconds: float  # this process's first steps: compilation, if any, and start of loaders


class Trainer:
    """Trains from the current position to the last epoch.

    Args:
        train: this process's part of the training images, reshuffled every epoch.
        validation: this process's part, in evaluation order; None if no images are held out.
        images: number of training images over all processes.
        peak: highest learning rate.
        checkpoints: written by rank 0 only.
        metadata: for the model files.
    """

    def __init__(
        self,
        step: TrainStep,
        train: Loader,
        validation: Loader | None,
        images: int,
        optim: OptimConfig,
        peak: float,
        log: LogConfig,
        checkpoints: Checkpoints,
        metadata: dict[str, Any],
        world: World,
    ) -> None:
        self.step, self.train, self.validation = step, train, validation
        self.optim, self.peak, self.log = optim, peak, log
        self.checkpoints, self.metadata, self.world = checkpoints, metadata, world
        self.position = 0  # completed steps
        self._sizes = step_sizes(images, optim.batch_size // world.size, world.size, shuffle=True)
        self.steps_per_epoch = len(train)
        self.steps = optim.epochs * self.steps_per_epoch
        self._ahead = step.looks_ahead
        self._logged: Totals | None = None  # of this epoch, at the last log record
        self._clock = Clock(world.device, step.first_steps)
        self._saved_at = time.monotonic()

    def resume(self, checkpoint: Checkpoint) -> None:
        """Restore the state of a checkpoint; the number of processes may differ.

        Raises:
            ValueError: the loader's settings differ.
        """
        state = checkpoint.state
        self.step.student.load_state_dict(checkpoint.model)
        self.step.load_state_dict(state["training"])
        self.train.load_state_dict(state["loader"])
        self.step.sums.base = None if state["totals"] is None else Totals(*state["totals"])
        self._logged = None if state["logged"] is None else Totals(*state["logged"])
        self.position = checkpoint.step

    def run(self, journal: Journal | NullJournal) -> Outcome:
        """Train to the last epoch.

        Raises:
            NonFiniteLossError: a loss or a parameter is NaN or infinite. The message has the step, the parts of the
                loss and the last good checkpoint; nothing was saved after that checkpoint.
            OSError: a checkpoint could not be written.
        """
        try:
            for epoch in range(self.position // self.steps_per_epoch, self.optim.epochs):
                self._epoch(epoch, journal)
        except NonFiniteLossError as error:
            rate, last = self._rate(self.position - 1), next(iter(self.checkpoints.paths()), "none")
            raise type(error)(f"{error}; learning rate {rate:.4g}; last good checkpoint: {last}") from None
        return Outcome(self._clock.images_per_second * self.world.size, self._clock.start_seconds)

    def _rate(self, step: int) -> float:
        return learning_rate(self.optim, self.peak, step, self.steps_per_epoch)

    def _epoch(self, epoch: int, journal: Journal | NullJournal) -> None:
        first, last = epoch * self.steps_per_epoch, (epoch + 1) * self.steps_per_epoch
        if self.position == first:
            self.train.set_epoch(epoch)
        self.step.trainable.train()
        self._clock.go()
        for batch, following in with_following(self.train, self._ahead):
            self.step(batch, self._sizes[self.position - first], self._rate(self.position), self.position, following)
            self.position += 1
            self._clock.count(batch.target.numel())
            if self.position < last:
                self._pause(epoch, journal)
        if self.position != last:
            raise RuntimeError(f"epoch {epoch + 1} ended at step {self.position}, not at step {last}")

        totals, _ = self.step.sums.read(self.world)
        self._clock.pause()
        self.step.sums.reset()
        self._logged = None
        record = {**self._record("epoch", epoch), **totals.means(), "start_seconds": self._clock.start_seconds}
        if self.validation is not None and ((epoch + 1) % self.log.validate_every == 0 or last == self.steps):
            self.world.copy_buffers(self.step.student)
            validation = evaluate(self.step.student, self.validation, self.world)
            check_finite("validation loss", validation, self.position)
            record |= {"validation_accuracy": validation.accuracy, "validation_loss": validation.loss}
            averaged = evaluate_average(self.step, self.validation, self.world)
            if averaged is not None:
                check_finite("validation loss of the average", averaged, self.position)
                record |= {"ema_validation_accuracy": averaged.accuracy, "ema_validation_loss": averaged.loss}
        journal.write(record)
        self._save(None)

    def _pause(self, epoch: int, journal: Journal | NullJournal) -> None:
        """Between two steps: write a log record, which checks the loss, and a checkpoint, if either is due."""
        every = self.log.checkpoint_every
        log = self.position % self.log.log_every == 0
        save = every > 0 and self.position % every == 0
        if not log and not save:
            return
        minutes = self.log.checkpoint_minutes
        overdue = minutes > 0 and time.monotonic() - self._saved_at > 60 * minutes
        totals, overdue = self.step.sums.read(self.world, overdue)
        self._clock.pause()
        if log:
            journal.write({**self._record("steps", epoch), **totals.plus(self._logged, -1).means()})
            self._logged = totals
        if save or overdue:
            self._save(totals)
        self._clock.go()

    def _record(self, kind: str, epoch: int) -> dict[str, Any]:
        return {
            "kind": kind,
            "step": self.position,
            "epoch": epoch + 1,
            "learning_rate": self._rate(self.position - 1),
            "images_per_second": self._clock.lap() * self.world.size,
        }

    def _save(self, totals: Totals | None) -> None:
        """Write a checkpoint from rank 0; `totals` are the sums of an unfinished epoch."""
        norms = torch._foreach_norm([p.detach() for p in self.step.trainable.parameters()])
        if not torch.stack(norms).isfinite().all():
            raise NonFiniteLossError(f"a parameter is not finite after step {self.position}")
        self._saved_at = time.monotonic()
        if not self.world.is_main:
            return
        state = {
            "training": self.step.state_dict(),
            "loader": self.train.state_dict(unused=int(self._ahead and totals is not None)),
            "totals": None if totals is None else list(totals),
            "logged": None if self._logged is None else list(self._logged),
        }
        self.checkpoints.save(self.position, model_bytes(self.step.student, self.metadata), state)
