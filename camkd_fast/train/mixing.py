"""Mixup and CutMix: each image of a batch is mixed with another one of the batch, and keeps the labels of both.

Mixup (arXiv 1710.09412) is lam x_i + (1 - lam) x_j with lam from Beta(alpha, alpha). CutMix (arXiv 1905.04899) pastes a
box of x_j, of 1 - lam of the area, at a uniform centre; the part of the box outside the image is cut off. One lam and
one box serve a batch. The host draws a few numbers, which depend only on seed, rank and step, and the device mixes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.counter_random import hashes, key, uniforms
from .config import OptimConfig

_MIXING = 5  # stream number, see `data.augment`


class MixedBatch(NamedTuple):
    images: Tensor  # (n, channels, H, W)
    second_target: Tensor  # (n,) int64
    mix: Tensor  # (n,) float32, the share of the first label


class Mixer:
    """Draws the numbers of each step.

    Args:
        seed, rank: a process of a run.
    """

    def __init__(self, optim: OptimConfig, seed: int, rank: int) -> None:
        self._alphas = optim.mixup, optim.cutmix
        self._seed, self._rank = seed, rank

    def inputs(self, n: int, step: int) -> list[Tensor]:
        """Numbers of a step, counted from 0, for n images, on the host: what `mixed` takes besides the batch.

        Returns:
            The partner of each image, (n,) int64, and float32 (4,): the weight of the image itself outside of the box,
            then the box: row and column of its centre and half of its side, as fractions of the image's sides.
        """
        stream = key(_MIXING, self._seed, self._rank, step)
        partner = np.argsort(hashes(stream, np.arange(n)))
        choice, row, column = uniforms(stream, np.array([n]), 3)[0]
        mixup, cutmix = self._alphas
        cuts = cutmix > 0 and (mixup == 0 or choice < 0.5)
        # The legacy generator: its stream is the same in every version of numpy.
        words = stream.view(np.uint32)
        alpha = cutmix if cuts else mixup
        share = np.random.RandomState(words).beta(alpha, alpha)
        numbers = (1.0, row, column, np.sqrt(1.0 - share) / 2) if cuts else (share, 0.0, 0.0, 0.0)
        return [torch.from_numpy(partner), torch.tensor(numbers, dtype=torch.float32)]


def mixer_for(optim: OptimConfig, seed: int, rank: int) -> Mixer | None:
    """The mixer that `optim` asks for; None if images are not mixed."""
    return Mixer(optim, seed, rank) if optim.mixup or optim.cutmix else None


def mixed(images: Tensor, target: Tensor, partner: Tensor, numbers: Tensor) -> MixedBatch:
    """Mix a batch; all tensors on its device, from which nothing is read.

    Args:
        images: (n, channels, H, W).
        target: (n,) int64.
        partner, numbers: of `Mixer.inputs`.
    """
    H, W = images.shape[2:]
    own, row, column, half = numbers.unbind()
    inside_rows, height = _inside(H, row, half, images)
    inside_columns, width = _inside(W, column, half, images)
    weight = torch.where(inside_rows[:, None] & inside_columns, 0.0, own)
    share = own * (1.0 - height * width / (H * W))
    result = torch.lerp(images.index_select(0, partner), images, weight, out=torch.empty_like(images))
    return MixedBatch(result, target.index_select(0, partner), share.expand(len(target)).contiguous())


def _inside(side: int, centre: Tensor, half: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each pixel along one side lies in the box, (side,) bool, and the number of those that do."""
    middle, reach = (centre * side).floor(), (half * side).floor()
    first, last = (middle - reach).clamp(min=0), (middle + reach).clamp(max=side)
    pixels = torch.arange(side, device=like.device)
    return (pixels >= first) & (pixels < last), last - first
