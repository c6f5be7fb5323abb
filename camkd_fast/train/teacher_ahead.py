"""The teachers of the next batch, computed beside the student's step on this one.

Teachers do not depend on the student, and at small batches neither fills a GPU. So a step's graph has two branches: the
student's step on a batch whose teacher outputs are there, and the teachers' forward on the batch after it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.batch import Batch
from ..models.protocol import Prediction
from .config import PrecisionConfig
from .generators import default_generator
from .teachers.live import Teachers, side_by_side

log = logging.getLogger(__name__)


class StudentBatch(NamedTuple):
    """A batch as the student's step reads it, on the device."""

    images: Tensor  # (n, channels, H, W) float32, those that the teachers received
    target: Tensor  # (n,) int64
    teacher_outputs: list[Prediction]  # K; empty without teachers
    second: tuple[Tensor, ...] = ()  # second labels (n,) int64 and shares of the first ones (n,) of mixed images

    def tensors(self) -> list[Tensor]:
        outputs = [tensor for output in self.teacher_outputs for tensor in output]
        return [self.images, self.target, *outputs, *self.second]

    def clone(self) -> StudentBatch:
        outputs = [Prediction(*(tensor.clone() for tensor in output)) for output in self.teacher_outputs]
        second = tuple(tensor.clone() for tensor in self.second)
        return StudentBatch(self.images.clone(), self.target.clone(), outputs, second)


class DrawsRandomNumbersError(RuntimeError):
    """Teachers or augmentation draw random numbers on the device, which would be those of the step before."""


class TeacherAhead:
    """Memory for one batch that is ready for the student, and the order of work around it.

    Costs the memory of one batch of images and of teacher outputs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ready: StudentBatch | None = None  # allocated once: a CUDA graph reads and writes it
        self._batch: Batch | None = None  # the one that is ready

    def advance(self, batch: Batch, following: Batch | None, prepare: Callable[[Batch], StudentBatch]) -> Batch:
        """See to it that `batch` is ready, and return the batch to prepare beside the student's step on it.

        That is `following` if it has the size of `batch` and comes from the same loader. Otherwise it is `batch` once
        more, whose outputs are not used: a recorded branch cannot be skipped.

        Args:
            prepare: called if `batch` was not prepared beside the step before.

        Raises:
            DrawsRandomNumbersError: `prepare` drew from the device's default generator, whose state is restored.
        """
        if self._batch is not batch:
            generator = default_generator(self._device)
            state = generator.get_state()
            prepared = prepare(batch)
            if not torch.equal(generator.get_state(), state):
                generator.set_state(state)
                raise DrawsRandomNumbersError
            if self._ready is None:
                self._ready = prepared.clone()
            else:
                _copy(prepared, self._ready)
        fits = following is not None and len(following.target) == len(batch.target)
        self._batch = following if fits and following is not None and following.finish is batch.finish else None
        return self._batch or batch

    def run(self, learn: Callable[[StudentBatch], None], prepare: Callable[[], StudentBatch]) -> None:
        """The student's step on the ready batch and, beside it, the next one's preparation. Can be recorded."""
        ready = self._ready
        assert ready is not None  # `advance` comes first
        tasks: list[Callable[[], StudentBatch | None]] = [partial(learn, ready), prepare]
        _, following = side_by_side(tasks, self._device)
        assert isinstance(following, StudentBatch)
        _copy(following, ready)

    def forget(self) -> None:
        """The next batches may have other shapes."""
        self._ready = self._batch = None


def _copy(source: StudentBatch, target: StudentBatch) -> None:
    torch._foreach_copy_(target.tensors(), source.tensors())


def ahead_for(
    precision: PrecisionConfig, device: torch.device, graph: bool, teachers: Teachers | None
) -> TeacherAhead | None:
    """A `TeacherAhead` if `precision` asks for one; None if no teacher can run ahead, which is logged if it was "on".

    Args:
        graph: whether steps are recorded.
    """
    missing = None
    if teachers is None:
        missing = "there are no teachers"
    elif not teachers.computes:
        missing = "their outputs are replayed from a cache"
    elif not graph:
        missing = "steps are not replayed as a CUDA graph"
    if missing is not None and precision.teacher_ahead == "on":
        log.warning("teachers do not run ahead of the student: %s", missing)
    return TeacherAhead(device) if missing is None and precision.teacher_ahead != "off" else None


def with_following(batches: Iterable[Batch], ahead: bool) -> Iterator[tuple[Batch, Batch | None]]:
    """Each batch with the one after it; with None for the last one, and everywhere if `ahead` is False.

    With `ahead`, the batch after the one that is in use has been read.
    """
    before: Batch | None = None
    for batch in batches:
        if not ahead:
            yield batch, None
        elif before is not None:
            yield before, batch
        before = batch
    if ahead and before is not None:
        yield before, None
