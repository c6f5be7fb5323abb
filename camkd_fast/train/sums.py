"""Running sums of losses and weights, kept on the device; the only place that copies them to the host."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .distributed import World

LOSSES = ("loss", "hard", "soft", "feature")


class NonFiniteLossError(RuntimeError):
    """Training diverged."""


class NonFiniteTeachersError(NonFiniteLossError):
    """The teachers' part of the loss is not finite, though the student's logits are."""


class BatchNumbers(Protocol):
    """The part of a step's objective that `Sums.add` uses."""

    @property
    def numbers(self) -> Tensor: ...  # (5,) sums over the batch: the LOSSES, then correct predictions
    @property
    def weights(self) -> Tensor | None: ...  # (K,) sums over the batch
    @property
    def feature_weights(self) -> Tensor | None: ...


class Totals(NamedTuple):
    """Sums over the images of all processes, on the host."""

    images: int
    losses: list[float]  # in the order of LOSSES
    correct: int
    weights: list[float]  # K; empty without teachers
    feature_weights: list[float]

    def plus(self, other: Totals | None, factor: int = 1) -> Totals:
        """self + factor * other."""
        if other is None:
            return self

        def add(one: list[float], two: list[float]) -> list[float]:
            return [a + factor * b for a, b in zip(one, two, strict=True)]

        return Totals(
            self.images + factor * other.images,
            add(self.losses, other.losses),
            self.correct + factor * other.correct,
            add(self.weights, other.weights),
            add(self.feature_weights, other.feature_weights),
        )

    def means(self) -> dict[str, Any]:
        """Means over images, by name, ready for JSON."""
        images = max(self.images, 1)
        return {
            **{name: total / images for name, total in zip(LOSSES, self.losses, strict=True)},
            "train_accuracy": self.correct / images,
            "weights": [total / images for total in self.weights],
            "feature_weights": [total / images for total in self.feature_weights],
        }


class Reading(NamedTuple):
    totals: Totals
    flag: bool  # rank 0's argument of `read`


class Sums:
    """Sums over the steps since `reset`, and the first step whose loss was not finite.

    Attributes:
        base: sums over all processes from the checkpoint of a resumed epoch, or None.
    """

    def __init__(self) -> None:
        self._total: Tensor | None = None  # float64: numbers, weights, feature weights
        self._num_weights = 0
        self._bad_step = self._bad_losses = torch.empty(0)  # allocated with `_total`, on its device
        self.reset()

    def reset(self) -> None:
        self.base: Totals | None = None
        self._images = 0
        if self._total is not None:  # in place: a CUDA graph adds to this memory
            self._total.zero_()
            self._bad_step.fill_(-1.0)

    def count(self, images: int) -> None:
        """Count the images of a step on the host; `add` does the rest on the device."""
        self._images += images

    def add(self, batch: BatchNumbers, images: int, step: float | Tensor) -> None:
        """Add the numbers of a step of `images` images, without synchronising; can be recorded in a CUDA graph.

        Args:
            step: its number, counted from 1.
        """
        weights = [w for w in (batch.weights, batch.feature_weights) if w is not None]
        numbers = torch.cat([batch.numbers, *weights]).double()
        if self._total is None:
            self._num_weights = 0 if batch.weights is None else batch.weights.numel()
            self._total = torch.zeros_like(numbers)
            self._bad_step = numbers.new_full((1,), -1.0)
            self._bad_losses = numbers.new_zeros(len(LOSSES))
        first = (self._bad_step < 0) & ~numbers[0].isfinite()
        # masked_fill_ would copy a `step` on the device to the host.
        self._bad_step.copy_(torch.where(first, step, self._bad_step))
        self._bad_losses.copy_(torch.where(first, numbers[: len(LOSSES)] / images, self._bad_losses))
        self._total += numbers

    def read(self, world: World, flag: bool = False) -> Reading:
        """Sums over all processes: one collective, one copy to the host.

        Raises:
            NonFiniteLossError: a loss since the last reset was NaN or infinite; the message has step and parts, and a
                subclass says that teachers are the reason.
        """
        if self._total is None or self._images == 0:
            raise RuntimeError("no step was taken since the sums were reset")
        host = self._total.new_tensor([float(self._images), float(flag)])
        mine = torch.cat([self._bad_step, self._bad_losses, host, self._total])
        rows = world.gather(mine).tolist()
        diverged = [row for row in rows if row[0] >= 0]
        if diverged:
            step, *losses = min(diverged)[: 1 + len(LOSSES)]
            parts = ", ".join(f"{name} {value:.4g}" for name, value in zip(LOSSES, losses, strict=True))
            fault = f"the loss is not finite at step {int(step)}: {parts}"
            hard, soft = (losses[LOSSES.index(name)] for name in ("hard", "soft"))
            if math.isfinite(hard) and math.isnan(soft):  # infinity may also come of a student's -inf
                raise NonFiniteTeachersError(
                    f"{fault}; the student's part is finite, so a teacher gives NaN or infinity"
                )
            raise NonFiniteLossError(fault)
        images, _, *total = (sum(column) for column in list(zip(*rows, strict=True))[1 + len(LOSSES) :])
        losses, correct, rest = total[: len(LOSSES)], total[len(LOSSES)], total[len(LOSSES) + 1 :]
        totals = Totals(int(images), losses, int(correct), rest[: self._num_weights], rest[self._num_weights :])
        return Reading(totals.plus(self.base), bool(rows[0][2 + len(LOSSES)]))
