"""Random crops and flips, one record per sample.

A record depends only on (seed, view, sample index), not on the batch, order, rank or loader. Every loader therefore
produces the same crops, a view can be replayed exactly, and a teacher cache can be keyed by it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .counter_random import key, uniforms
from .rand_augment import LARGEST

Integers = NDArray[np.int64]

_AUGMENTATION = 2  # stream number; the sample order uses the same seed with another one
_TRIES = 10  # windows drawn before the fallback, as in torchvision's RandomResizedCrop
_LATER = ("rand_augment", "erasing")
_LANES = 3 + 2 * _TRIES  # uniforms per sample: flip, row, column, then an area and a ratio per try


@dataclass(frozen=True)
class Augmentation:
    """Settings of the training augmentation. `Augmentation(padding=0, flip=False)` only shuffles.

    "crop" shifts the image by up to `padding` pixels in each direction and fills with level 0; files are first cut to
    their central square and resized. "resized-crop" resizes a random window with a fraction `scale` of the image's area
    and a width-to-height `ratio`, distributed as in torchvision's RandomResizedCrop.

    Raises:
        ValueError: the kind is unknown, the padding is negative, `scale` is not a range within (0, 1], `ratio` is not a
            range above 0, or a number of RandAugment or random erasing is out of its range.
    """

    kind: Literal["crop", "resized-crop"] = "crop"
    padding: int = 4  # pixels, for "crop"
    flip: bool = True  # mirror left and right with probability 1/2
    scale: tuple[float, float] = (0.08, 1.0)  # for "resized-crop"
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    rand_augment: tuple[int, int] | None = None  # operations per image and their magnitude, see `rand_augment`
    erasing: float = 0.0  # probability of a box of zeros in the normalised image, see `erasing`

    def __post_init__(self) -> None:
        if self.kind not in ("crop", "resized-crop"):
            raise ValueError(f"kind must be 'crop' or 'resized-crop', got {self.kind!r}")
        if self.padding < 0:
            raise ValueError(f"padding must be at least 0, got {self.padding}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be a range within (0, 1], got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1] < np.inf:
            raise ValueError(f"ratio must be a range above 0, got {self.ratio}")
        if self.rand_augment is not None:
            rounds, magnitude = self.rand_augment
            if rounds < 1 or not 0 <= magnitude <= LARGEST:
                given = f"{rounds} of {magnitude}"
                raise ValueError(f"rand_augment must be 1 operation or more of magnitude 0 to {LARGEST}, got {given}")
        if not 0 <= self.erasing <= 1:
            raise ValueError(f"erasing must lie in [0, 1], got {self.erasing}")

    def __repr__(self) -> str:
        """The settings as text, which is part of checkpoints and of the keys of caches.

        Settings that were added later are left out while they have their defaults, so that older files stay valid.
        """
        used = [f for f in fields(self) if f.name not in _LATER or getattr(self, f.name) != f.default]
        return f"Augmentation({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in used)})"

    @property
    def of_levels(self) -> bool:
        """Whether crops are augmented further."""
        return self.rand_augment is not None or self.erasing > 0


class Records(NamedTuple):
    """Augmentation of n images. The steps are applied in this order."""

    windows: Integers  # (n, 4) top, left, height, width of the part that is resized to the output size
    shifts: Integers  # (n, 2) row and column of the resized image that become the output's first ones
    mirrored: NDArray[np.bool_]  # (n,)


def records(augmentation: Augmentation | None, seed: int, view: int, index: Integers, sizes: Integers) -> Records:
    """Augmentation records of the samples `index` (n,) in one view.

    Args:
        augmentation: None means evaluation: the central square, neither shifted nor mirrored.
        sizes: (n, 2) or (1, 2) height and width of the images.
    """
    n = len(index)
    sizes = np.broadcast_to(sizes, (n, 2))
    if augmentation is None:
        return Records(central_squares(sizes), np.zeros((n, 2), np.int64), np.zeros(n, np.bool_))
    draws = uniforms(key(_AUGMENTATION, seed, view), index, _LANES)
    mirrored = (draws[:, 0] < 0.5) & augmentation.flip
    if augmentation.kind == "resized-crop":
        return Records(_random_windows(augmentation, draws[:, 1:], sizes), np.zeros((n, 2), np.int64), mirrored)
    offsets = 2 * augmentation.padding + 1
    shifts = (draws[:, 1:3] * offsets).astype(np.int64) - augmentation.padding
    return Records(central_squares(sizes), shifts, mirrored)


def central_squares(sizes: Integers) -> Integers:
    """(n, 4) top, left, height, width of the largest centred square of images with `sizes` (n, 2)."""
    side = sizes.min(1, keepdims=True)
    return np.concatenate([(sizes - side) // 2, side, side], 1)


def _random_windows(augmentation: Augmentation, draws: NDArray[np.float64], sizes: Integers) -> Integers:
    """The first random window that fits; if none does, the largest centred one with an allowed ratio."""
    position, area, ratio = draws[:, :2], draws[:, 2 : 2 + _TRIES], draws[:, 2 + _TRIES :]
    H, W = sizes[:, :1], sizes[:, 1:]
    low, high = augmentation.scale
    area = H * W * (low + (high - low) * area)
    narrow, wide = augmentation.ratio
    ratio = np.exp(np.log(narrow) + (np.log(wide) - np.log(narrow)) * ratio)
    tried = np.stack([np.rint(np.sqrt(area / ratio)), np.rint(np.sqrt(area * ratio))])  # (2, n, tries)
    fits = ((tried > 0) & (tried <= np.stack([H, W]))).all(0)
    first = fits.argmax(1)
    window = tried[:, np.arange(len(first)), first].T
    corner = np.floor(position * (sizes - window + 1))

    fallback = np.concatenate([np.minimum(H, np.rint(W / narrow)), np.minimum(W, np.rint(H * wide))], 1)
    found = np.take_along_axis(fits, first[:, None], 1)
    window = np.where(found, window, np.maximum(fallback, 1))
    corner = np.where(found, corner, (sizes - window) // 2)
    return np.concatenate([corner, window], 1).astype(np.int64)
