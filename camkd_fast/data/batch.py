"""The interface of all loaders: batches, settings and the `Loader` protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .augment import Augmentation

CPU = torch.device("cpu")


class Batch(NamedTuple):
    """n samples of one view, shared by the student and the teachers."""

    # (n, channels, H, W) float32 on the device, normalised; or (n, ...), on the host, of which `finish` makes these.
    images: Tensor
    target: Tensor  # (n,) int64 on the device; on the host if the loader is `deferred`
    # Positions of the samples in the data set: (n,) int64 on the CPU. Shadows tuple.index, which is not needed.
    index: Tensor  # type: ignore[assignment]
    view: int  # number of the augmentation view
    # From `images` on the device; the same function in every batch of a loader.
    finish: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class LoaderConfig:
    """Settings of a loader.

    Raises:
        ValueError: a number is out of its range.
    """

    batch_size: int  # per process
    seed: int = 0  # for the order and the augmentation
    augmentation: Augmentation | None = None  # None: evaluation, unchanged pixels in the set's order
    view_seed: int | None = None  # for the augmentation only; None: `seed`
    views: int | None = None  # epoch e uses view e % views; None: a new view in every epoch
    rank: int = 0
    world: int = 1
    workers: int = 2  # threads (DALI) or processes (torch) that decode
    device: torch.device = CPU
    channels_last: bool = False  # memory format of the images
    skip_bad: int = 0  # unreadable files to skip, per process; the next one raises BadImageError
    known_bad: tuple[int, ...] = ()  # positions of files found unreadable before, which are skipped and counted
    # Leave the labels on the host, whose inputs the step copies at once, and the last operations on pixels to
    # `Batch.finish`, where the loader has one: the step may record them.
    deferred: bool = False

    def __post_init__(self) -> None:
        limits = {"batch_size": 1, "world": 1, "rank": 0, "workers": 0, "skip_bad": 0}
        for name, least in limits.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.rank >= self.world:
            raise ValueError(f"rank must lie in [0, {self.world}), got {self.rank}")
        if len(self.known_bad) > self.skip_bad:
            raise ValueError(
                f"{len(self.known_bad)} files are unreadable, at most skip_bad={self.skip_bad} are skipped"
            )
        if self.views is not None and self.views < 1:
            raise ValueError(f"views must be at least 1, got {self.views}")

    @property
    def augmentation_seed(self) -> int:
        return self.seed if self.view_seed is None else self.view_seed

    def view(self, epoch: int) -> int:
        """Number of the view that `epoch` uses."""
        return epoch if self.views is None else epoch % self.views


class Loader(Protocol):
    """Yields every sample once per epoch over all ranks. Order and augmentation depend only on seeds and epoch."""

    num_samples: int  # per epoch on this rank, unreadable files included

    def __len__(self) -> int:
        """Number of batches per epoch on this rank."""

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch. The position is kept if the epoch does not change, and reset to 0 otherwise."""

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches from the current position to the end of the epoch, which resets the position to 0."""

    def state_dict(self, unused: int = 0) -> dict[str, Any]:
        """The position after the last batch yielded, without the last `unused` ones of this epoch.

        Loadable with `weights_only=True`.
        """

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`, which another kind of loader or another number of ranks may have saved.

        Raises:
            ValueError: the state was saved with other settings; the message gives both values.
        """

    def close(self) -> None:
        """Release threads, processes and memory."""


class BadImageError(ValueError):
    """An image file cannot be decoded. The message names the file."""
