"""Labelled images in memory, stratified splits, and wrong labels for experiments."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


def channel_factors(
    mean: Sequence[float], std: Sequence[float], device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """The mean and 1 / std of each channel, (C, 1, 1) float32, as `normalised` takes them."""
    shift, deviation = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (mean, std))
    return shift, 1 / deviation


def normalised(levels: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    """Normalise uint8 levels to float32: (levels - mean) * factor, in tensors that can be broadcast to the levels.

    It multiplies by 1 / std instead of dividing, which matches DALI bit for bit.
    """
    return levels.to(torch.float32, copy=True).sub_(mean).mul_(factor)


@dataclass(frozen=True)
class LabelledImages:
    """Images as uint8 levels. Loaders normalise them."""

    pixels: Tensor  # (N, channels, H, W) uint8
    labels: Tensor  # (N,) int64 in [0, num_classes)
    num_classes: int
    mean: tuple[float, ...]  # per channel, in pixel levels
    std: tuple[float, ...]
    class_names: tuple[str, ...] | None = None  # in the order of the labels; None: unknown

    def __len__(self) -> int:
        return self.labels.numel()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, H, W) of every image."""
        _, channels, H, W = self.pixels.shape
        return channels, H, W

    @property
    def channels(self) -> int:
        return self.pixels.shape[1]

    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of pixels, labels, their order and the normalisation.

        Computed once, at 1 to 2 GB/s; the tensors must not change afterwards.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        settings = (tuple(self.pixels.shape), self.num_classes, self.mean, self.std)
        digest = hashlib.sha256(repr(settings).encode())
        for tensor in (self.pixels, self.labels):
            digest.update(tensor.cpu().contiguous().view(-1).numpy().data)
        return digest.hexdigest()

    def take(self, index: Tensor) -> LabelledImages:
        """The images at `index` (M,) int64."""
        return replace(self, pixels=self.pixels[index], labels=self.labels[index])

    def padded(self, side: int) -> LabelledImages:
        """The images centred in black squares of `side` pixels. Mean and std stay those of the unpadded images.

        Raises:
            ValueError: the images are larger than `side`.
        """
        _, H, W = self.shape
        if max(H, W) > side:
            raise ValueError(f"images of {H}x{W} pixels can be padded to no less than {max(H, W)}, got size {side}")
        top, left = (side - H) // 2, (side - W) // 2
        return replace(self, pixels=F.pad(self.pixels, (left, side - W - left, top, side - H - top)))

    def normalise(self, pixels: Tensor) -> Tensor:
        """Normalise uint8 levels (M, channels, H, W) to float32, to the same bits as the loaders."""
        return normalised(pixels, *channel_factors(self.mean, self.std, pixels.device))


def check_labels(labels: Tensor, num_classes: int, source: object) -> None:
    """Refuse labels outside [0, num_classes).

    Raises:
        ValueError: a label is outside. The message gives the first one, its position and `source`, the file.
    """
    outside = ((labels < 0) | (labels >= num_classes)).nonzero()
    if len(outside):
        position = int(outside[0])
        raise ValueError(f"{source}: label {int(labels[position])} of image {position} lies outside [0, {num_classes})")


def stratified_parts(labels: Tensor, sizes: Sequence[int], seed: int) -> list[Tensor]:
    """Disjoint index sets of the given sizes, each with every class in proportion (within one image).

    All are slices of one order in which the classes are evenly spread, so a smaller first part is a subset of a larger.

    Raises:
        ValueError: the sizes add up to more than the number of labels.
    """
    if sum(sizes) > labels.numel():
        raise ValueError(f"parts of {sum(sizes)} images cannot be taken from {labels.numel()}")
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(labels.numel(), generator=generator)
    position = torch.empty(labels.numel(), dtype=torch.float64)
    for label in range(int(labels.max()) + 1):
        members = shuffled[labels[shuffled] == label]
        position[members] = (torch.arange(members.numel(), dtype=torch.float64) + 0.5) / members.numel()
    order = shuffled[position[shuffled].argsort(stable=True)]
    return list(torch.split(order[: sum(sizes)], list(sizes)))


def corrupt_labels(labels: Tensor, num_classes: int, fraction: float, seed: int, neighbour: bool = False) -> Tensor:
    """Copy of labels (N,) in which exactly round(fraction * N) are wrong.

    Args:
        fraction: of wrong labels, 0 to 1.
        neighbour: use the next class (y + 1 mod num_classes) instead of a uniformly random other class.

    Raises:
        ValueError: `fraction` is outside [0, 1].
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction must lie in [0, 1], got {fraction}")
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(labels.numel(), generator=generator)[: round(fraction * labels.numel())]
    offset = torch.randint(1, num_classes, (wrong.numel(),), generator=generator)
    corrupted = labels.clone()
    corrupted[wrong] = (labels[wrong] + (1 if neighbour else offset)) % num_classes
    return corrupted


def swap_labels(labels: Tensor, num_classes: int, one: int, other: int) -> Tensor:
    """Copy of labels (N,) in which two classes are swapped.

    Raises:
        ValueError: a class is outside [0, num_classes).
    """
    for label in (one, other):
        if not 0 <= label < num_classes:
            raise ValueError(f"classes to swap must lie in [0, {num_classes}), got {one} and {other}")
    swapped = labels.clone()
    swapped[labels == one], swapped[labels == other] = other, one
    return swapped
