"""Batches of images that stay in memory: gather, shift and normalise as a few batched tensor operations."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .images import LabelledImages


class ResidentBatches:
    """Every image once per epoch, in an order that depends on the seed and the epoch only.

    Iterating yields (images (n, channels, H, W) float32, labels (n,)); the last batch holds what is left.

    Args:
        shift: move every image by up to this many pixels in each direction, filling with level 0.
    """

    def __init__(self, data: LabelledImages, batch_size: int, seed: int, shift: int = 0) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.data, self.batch_size, self.seed, self.shift = data, batch_size, seed, shift
        self._epoch = 0
        if shift:
            padded = F.pad(data.pixels, (shift,) * 4)
            H, W = data.pixels.shape[2:]
            self._windows = padded.unfold(2, H, 1).unfold(3, W, 1)  # a view: (N, channels, 2s+1, 2s+1, H, W)

    def __len__(self) -> int:
        return -(-len(self.data) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the shifts of the next iteration."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        N = len(self.data)
        # One generator per (seed, epoch): any epoch can be replayed without the ones before it.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self._epoch)
        device = self.data.pixels.device
        order = torch.randperm(N, generator=generator).to(device)
        offsets = torch.randint(0, 2 * self.shift + 1, (2, N), generator=generator).to(device)
        batches = zip(torch.split(order, self.batch_size), torch.split(offsets, self.batch_size, dim=1), strict=True)
        for batch, (dy, dx) in batches:
            pixels = self._windows[batch, :, dy, dx] if self.shift else self.data.pixels[batch]
            yield self.data.normalise(pixels), self.data.labels[batch]
