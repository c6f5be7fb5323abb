"""Which samples make up each batch of an epoch, on each rank: one function for every loader."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .counter_random import hashes, key

_ORDER = 1  # keeps the order's random numbers apart from the augmentation's, which share the seed


def epoch_batches(N: int, batch_size: int, world: int, rank: int, seed: int, epoch: int, shuffle: bool) -> list[Tensor]:
    """The batches of one rank in one epoch, each (n,) int64 on the CPU; over all ranks every sample exactly once.

    A step takes the next G = batch_size * world samples of an order that depends on `seed` and `epoch` alone, and
    each rank its part of them. So 1 process of 64 and 2 of 32 see the same samples at every step.

    Args:
        shuffle: False gives index order in every epoch. A last step of fewer samples than ranks then leaves ranks
            without a batch. True joins a last step of fewer than two per rank (batch norm's least) to the one before.

    Raises:
        ValueError: the settings of `step_sizes`, or a rank outside [0, world).
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank must lie in [0, {world}), got {rank}")
    # The hashes differ, so that sorting them has one outcome.
    order = np.argsort(hashes(key(_ORDER, seed, epoch), np.arange(N))) if shuffle else np.arange(N)
    steps = torch.split(torch.from_numpy(order), step_sizes(N, batch_size, world, shuffle))
    return [part for step in steps if len(part := step.tensor_split(world)[rank])]


def step_sizes(N: int, batch_size: int, world: int, shuffle: bool) -> list[int]:
    """Samples of each step over all ranks.

    Raises:
        ValueError: no samples, a batch size or number of ranks below 1, or training with more ranks than samples.
    """
    for name, value in (("samples", N), ("batch_size", batch_size), ("world", world)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if shuffle and world > N:
        raise ValueError(f"{N} samples cannot be shared by {world} ranks")
    full, rest = divmod(N, batch_size * world)
    sizes = [batch_size * world] * full + [rest] * (rest > 0)
    if shuffle and full and 0 < rest < 2 * world:
        sizes[-2:] = [sum(sizes[-2:])]
    return sizes


def rank_sizes(N: int, batch_size: int, world: int, rank: int, shuffle: bool) -> list[int]:
    """Lengths of what `epoch_batches` returns, in any epoch."""
    sizes = [size // world + (rank < size % world) for size in step_sizes(N, batch_size, world, shuffle)]
    return [size for size in sizes if size]
