"""A labelled set of images in memory, and what may be done to its labels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LabelledImages:
    """Images as they are stored, normalised only when they are used."""

    pixels: Tensor  # (N, channels, H, W) uint8
    labels: Tensor  # (N,) int64 in [0, num_classes)
    num_classes: int
    mean: tuple[float, ...]  # per channel, in pixel levels
    std: tuple[float, ...]

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
        """SHA-256 in hexadecimal of all that a model can see of the set: pixels, labels, their order, normalisation.

        Computed once (some 1 to 2 GB/s); the tensors must not change afterwards.
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
        """The images in the middle of black squares, `side` pixels wide; mean and deviation stay those without border.

        Raises:
            ValueError: a side of the images is longer than that.
        """
        _, H, W = self.shape
        if max(H, W) > side:
            raise ValueError(f"images of {H}x{W} pixels can be padded to no less than {max(H, W)}, got size {side}")
        top, left = (side - H) // 2, (side - W) // 2
        return replace(self, pixels=F.pad(self.pixels, (left, side - W - left, top, side - H - top)))

    def normalise(self, pixels: Tensor) -> Tensor:
        """(M, channels, H, W) levels as float32 with the set's mean 0 and deviation 1."""
        mean, std = (torch.tensor(v, device=pixels.device).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (pixels.float() - mean) / std


def check_labels(labels: Tensor, num_classes: int, source: object) -> None:
    """Refuse labels outside [0, num_classes).

    Raises:
        ValueError: names the first such label, its position and `source`, where the labels were read.
    """
    outside = ((labels < 0) | (labels >= num_classes)).nonzero()
    if len(outside):
        position = int(outside[0])
        raise ValueError(f"{source}: label {int(labels[position])} of image {position} lies outside [0, {num_classes})")


def stratified_parts(labels: Tensor, sizes: Sequence[int], seed: int) -> list[Tensor]:
    """Disjoint index sets of the given sizes, each with every class in proportion (within one image).

    Images are dealt in an order in which any stretch has the classes evenly spread, so nested sizes give nested parts.

    Raises:
        ValueError: the sizes ask for more images than there are labels.
    """
    if sum(sizes) > labels.numel():
        raise ValueError(f"parts of {sum(sizes)} images were asked for, but there are {labels.numel()}")
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(labels.numel(), generator=generator)
    position = torch.empty(labels.numel(), dtype=torch.float64)
    for label in range(int(labels.max()) + 1):
        members = shuffled[labels[shuffled] == label]
        position[members] = (torch.arange(members.numel(), dtype=torch.float64) + 0.5) / members.numel()
    dealt = shuffled[position[shuffled].argsort(stable=True)]
    return list(torch.split(dealt[: sum(sizes)], list(sizes)))


def corrupt_labels(labels: Tensor, num_classes: int, fraction: float, seed: int, neighbour: bool = False) -> Tensor:
    """Labels (N,) of which exactly round(fraction * N) are wrong.

    Args:
        fraction: share of wrong labels, 0 to 1.
        neighbour: take the next class (y + 1 mod num_classes) rather than any other class with equal chance.
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
    """Labels (N,) in which two classes have changed places.

    Raises:
        ValueError: a class outside [0, num_classes).
    """
    for label in (one, other):
        if not 0 <= label < num_classes:
            raise ValueError(f"classes to swap must lie in [0, {num_classes}), got {one} and {other}")
    swapped = labels.clone()
    swapped[labels == one], swapped[labels == other] = other, one
    return swapped
