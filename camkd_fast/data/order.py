"""Order of the samples: the batches of an epoch on each rank, for every loader."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .counter_random import hashes, key

_ORDER = 1  # stream number; the augmentation uses the same seed with another one


def epoch_batches(N: int, batch_size: int, world: int, rank: int, seed: int, epoch: int, shuffle: bool) -> list[Tensor]:
    """The batches of one rank in one epoch, each (n,) int64 on the CPU. Over all ranks every sample occurs once.

    The order depends only on `seed` and `epoch`. Each step splits its next batch_size * world samples among the ranks,
    so 1 process with batch size 64 and 2 with 32 see the same samples at every step.

    Args:
        shuffle: False keeps index order in every epoch; a last step of fewer samples than ranks leaves ranks without a
            batch. True merges a last step of fewer than two samples per rank, batch norm's minimum, into the previous.

    Raises:
        ValueError: the arguments are invalid for `step_sizes`, or the rank is outside [0, world).
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank must lie in [0, {world}), got {rank}")
    # The hashes are distinct, so that argsort has only one result.
    order = np.argsort(hashes(key(_ORDER, seed, epoch), np.arange(N))) if shuffle else np.arange(N)
    steps = torch.split(torch.from_numpy(order), step_sizes(N, batch_size, world, shuffle))
    return [part for step in steps if len(part := step.tensor_split(world)[rank])]


def step_sizes(N: int, batch_size: int, world: int, shuffle: bool) -> list[int]:
    """Number of samples of each step, over all ranks.

    Raises:
        ValueError: N, the batch size or the number of ranks is below 1, or there are more ranks than shuffled samples.
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
    """Lengths of the batches that `epoch_batches` returns, the same in every epoch."""
    sizes = [size // world + (rank < size % world) for size in step_sizes(N, batch_size, world, shuffle)]
    return [size for size in sizes if size]
