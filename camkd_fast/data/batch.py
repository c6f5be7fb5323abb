"""What loaders yield and what they are asked for: the contract of `resident`, `dali` and `torch` alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .augment import Augmentation

CPU = torch.device("cpu")


class Batch(NamedTuple):
    """n samples of one view, for student and teachers alike."""

    images: Tensor  # (n, channels, H, W) float32 on the device, normalised
    target: Tensor  # (n,) int64 on the device
    # Positions of the samples in the data set: (n,) int64 on the CPU. Hides the method of tuples, which nobody needs.
    index: Tensor  # type: ignore[assignment]
    view: int  # with which number the samples were augmented


@dataclass(frozen=True)
class LoaderConfig:
    """What a loader delivers, and to whom.

    Raises:
        ValueError: a number out of its range.
    """

    batch_size: int  # per process
    seed: int = 0  # of order and augmentation
    augmentation: Augmentation | None = None  # None is evaluation: pixels unchanged, in the set's order
    view_seed: int | None = None  # of the augmentation alone; None: `seed`
    views: int | None = None  # epoch e sees view e % views; None: a new view in every epoch
    rank: int = 0
    world: int = 1
    workers: int = 2  # threads (DALI) or processes (torch) that decode
    device: torch.device = CPU
    channels_last: bool = False  # memory format of the images
    skip_bad: int = 0  # unreadable files to leave out, per process, before the next one is an error

    def __post_init__(self) -> None:
        limits = {"batch_size": 1, "world": 1, "rank": 0, "workers": 0, "skip_bad": 0}
        for name, least in limits.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.rank >= self.world:
            raise ValueError(f"rank must lie in [0, {self.world}), got {self.rank}")
        if self.views is not None and self.views < 1:
            raise ValueError(f"views must be at least 1, got {self.views}")

    @property
    def augmentation_seed(self) -> int:
        return self.seed if self.view_seed is None else self.view_seed

    def view(self, epoch: int) -> int:
        """The view that an epoch sees."""
        return epoch if self.views is None else epoch % self.views


class Loader(Protocol):
    """Every sample once per epoch over all ranks; order and augmentation are functions of (seed, epoch)."""

    num_samples: int  # of this rank, per epoch, unreadable files included

    def __len__(self) -> int:
        """Batches of this rank per epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to iterate over. The position in it stays if it is the present one, else becomes 0."""

    def __iter__(self) -> Iterator[Batch]:
        """The batches from the present position to the end of the epoch, where the position is 0 again."""

    def state_dict(self) -> dict[str, Any]:
        """The position, after the last batch that was handed out; loadable with `weights_only=True`."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken, also by another kind of loader or on another number of ranks.

        Raises:
            ValueError: the loader that left the state had other settings; both values are named.
        """

    def close(self) -> None:
        """Release threads, processes and memory."""


class BadImageError(ValueError):
    """A file that cannot be decoded; the message names it."""
