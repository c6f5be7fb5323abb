"""Random crops and flips, decided sample by sample: which part of an image is seen in which view.

A record is a function of (seed, view, index of the sample) alone, not of batch, order, rank or loader. So every
loader sees the same crops, a view can be replayed exactly, and a teacher cache can be keyed by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .counter_random import key, uniforms

Integers = NDArray[np.int64]

_AUGMENTATION = 2  # keeps these random numbers apart from the order's, which share the seed
_TRIES = 10  # windows drawn before the fallback, as in torchvision's RandomResizedCrop
_LANES = 3 + 2 * _TRIES


@dataclass(frozen=True)
class Augmentation:
    """How training images vary. `Augmentation(padding=0, flip=False)` shuffles, but changes no image.

    "crop": shift by up to `padding` pixels in each direction, filling with level 0 (files: their central square,
    resized). "resized-crop": a window of a share `scale` of the image's area and a width-to-height `ratio`, resized
    (the distribution of torchvision's RandomResizedCrop).

    Raises:
        ValueError: an unknown kind, a negative padding, or a range that is empty or not within (0, 1] or above 0.
    """

    kind: Literal["crop", "resized-crop"] = "crop"
    padding: int = 4  # pixels, for "crop"
    flip: bool = True  # mirror left and right with probability 1/2
    scale: tuple[float, float] = (0.08, 1.0)  # for "resized-crop"
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        if self.kind not in ("crop", "resized-crop"):
            raise ValueError(f"kind must be 'crop' or 'resized-crop', got {self.kind!r}")
        if self.padding < 0:
            raise ValueError(f"padding must be at least 0, got {self.padding}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be a range within (0, 1], got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1] < np.inf:
            raise ValueError(f"ratio must be a range above 0, got {self.ratio}")


class Records(NamedTuple):
    """What is done to each of n images, in this order."""

    windows: Integers  # (n, 4) top, left, height, width of the part that is resized to the delivered size
    shifts: Integers  # (n, 2) row and column, in delivered pixels, that become the first ones
    mirrored: NDArray[np.bool_]  # (n,)


def records(augmentation: Augmentation | None, seed: int, view: int, index: Integers, sizes: Integers) -> Records:
    """What happens to the samples `index` (n,) in a view.

    Args:
        augmentation: None is evaluation: the central square, unshifted.
        sizes: (n, 2) or (1, 2) height and width of the images.
    """
    n = len(index)
    sizes = np.broadcast_to(sizes, (n, 2))
    if augmentation is None:
        return Records(central_squares(sizes), np.zeros((n, 2), np.int64), np.zeros(n, np.bool_))
    numbers = uniforms(key(_AUGMENTATION, seed, view), index, _LANES)
    mirrored = (numbers[:, 0] < 0.5) & augmentation.flip
    if augmentation.kind == "resized-crop":
        return Records(_random_windows(augmentation, numbers[:, 1:], sizes), np.zeros((n, 2), np.int64), mirrored)
    spots = 2 * augmentation.padding + 1
    shifts = (numbers[:, 1:3] * spots).astype(np.int64) - augmentation.padding
    return Records(central_squares(sizes), shifts, mirrored)


def central_squares(sizes: Integers) -> Integers:
    """(n, 4) top, left, height, width of the largest square in the middle of images of `sizes` (n, 2)."""
    side = sizes.min(1, keepdims=True)
    return np.concatenate([(sizes - side) // 2, side, side], 1)


def _random_windows(augmentation: Augmentation, numbers: NDArray[np.float64], sizes: Integers) -> Integers:
    """The first of several random windows that fits; if none does, the largest central one of a legal ratio."""
    place, area, ratio = numbers[:, :2], numbers[:, 2 : 2 + _TRIES], numbers[:, 2 + _TRIES :]
    H, W = sizes[:, :1], sizes[:, 1:]
    low, high = augmentation.scale
    area = H * W * (low + (high - low) * area)
    narrow, wide = augmentation.ratio
    ratio = np.exp(np.log(narrow) + (np.log(wide) - np.log(narrow)) * ratio)
    tried = np.stack([np.rint(np.sqrt(area / ratio)), np.rint(np.sqrt(area * ratio))])  # (2, n, tries)
    fits = ((tried > 0) & (tried <= np.stack([H, W]))).all(0)
    first = fits.argmax(1)
    window = tried[:, np.arange(len(first)), first].T
    corner = np.floor(place * (sizes - window + 1))

    legal = np.concatenate([np.minimum(H, np.rint(W / narrow)), np.minimum(W, np.rint(H * wide))], 1)
    found = np.take_along_axis(fits, first[:, None], 1)
    window = np.where(found, window, np.maximum(legal, 1))
    corner = np.where(found, corner, (sizes - window) // 2)
    return np.concatenate([corner, window], 1).astype(np.int64)
