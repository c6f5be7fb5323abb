"""RandAugment (arXiv 1909.13719): random operations of one magnitude on uint8 levels, the same in every loader.

Operations and magnitudes are torchvision's. The host draws which operations an image gets, a function of seed, view and
sample. The device applies them to all images of a batch that share one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .counter_random import key, uniforms

_RAND_AUGMENT = 3  # stream number, see `augment`
LARGEST = 30  # magnitude
# The first five are one affine map each.
OPERATIONS = (
    *("shear-x", "shear-y", "translate-x", "translate-y", "rotate"),
    *("brightness", "color", "contrast", "sharpness", "posterize", "solarize", "autocontrast", "equalize", "identity"),
)
_AFFINE = 5


class Draws(NamedTuple):
    """Operations of n images, in order."""

    operations: NDArray[np.int64]  # (n, rounds) positions in OPERATIONS
    signs: NDArray[np.float64]  # (n, rounds) 1 or -1


def draws(rounds: int, seed: int, view: int, index: NDArray[np.int64]) -> Draws:
    """Operations of the samples `index` (n,) in one view."""
    uniform = uniforms(key(_RAND_AUGMENT, seed, view), index, 2 * rounds)
    operations = (uniform[:, :rounds] * len(OPERATIONS)).astype(np.int64)
    return Draws(operations, np.where(uniform[:, rounds:] < 0.5, -1.0, 1.0))


def rand_augment(levels: Tensor, drawn: Draws, magnitude: int) -> Tensor:
    """Apply the operations to levels (n, channels, H, W) uint8, in new memory.

    Args:
        magnitude: 0 to LARGEST; for most operations 0 changes nothing.
    """
    size, strength = (levels.shape[2], levels.shape[3]), magnitude / LARGEST
    place = np.arange(len(levels))  # of each image in `levels`, which every round sorts by operation
    for operations, signs in zip(drawn.operations.T, drawn.signs.T, strict=True):
        kinds = np.maximum(operations, _AFFINE - 1)[place]
        order = np.argsort(kinds, kind="stable")
        place = place[order]
        levels = levels.index_select(0, torch.from_numpy(order).to(levels.device, non_blocking=True))
        numbers = _affine_maps(operations[place], signs[place] * strength, size)
        maps = torch.from_numpy(numbers).to(levels.device, non_blocking=True)
        for kind in np.unique(kinds).tolist():
            first, last = np.searchsorted(kinds[order], [kind, kind + 1]).tolist()
            group, values = levels[first:last], maps[first:last]
            if kind < _AFFINE:
                group.copy_(_warped(group, values))
            elif OPERATIONS[kind] != "identity":
                group.copy_(_APPLIED[OPERATIONS[kind]](group, values[:, 0].view(-1, 1, 1, 1), strength))
    return levels.index_select(0, torch.from_numpy(np.argsort(place)).to(levels.device, non_blocking=True))


# --- affine maps -----------------------------------------------------------------------------------------------------


def _affine_maps(
    operations: NDArray[np.int64], signed: NDArray[np.float64], size: tuple[int, int]
) -> NDArray[np.float32]:
    """(n, 6) per image (a, b, c, d, e, f): the source of pixel (x, y) is (a x + b y + c, d x + e y + f).

    For operations without a map the first number is the signed strength, -1 to 1.
    """
    H, W = size
    maps = np.tile(np.array([1.0, 0.0, 0.0, 0.0, 1.0, 0.0]), (len(operations), 1))
    for operation, column, value in (
        (0, 1, 0.3 * signed),  # shears
        (1, 3, 0.3 * signed),
        (2, 2, np.trunc(W * 150 / 331 * signed)),  # translations by whole pixels
        (3, 5, np.trunc(H * 150 / 331 * signed)),
    ):
        rows = operations == operation
        maps[rows, column] = value[rows]
    rows = operations == 4
    angle = np.deg2rad(30.0 * signed[rows])
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = W / 2, H / 2
    maps[rows] = np.stack([cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y], 1)
    maps[operations >= _AFFINE, 0] = signed[operations >= _AFFINE]
    return maps.astype(np.float32)


def _warped(levels: Tensor, maps: Tensor) -> Tensor:
    """The nearest source pixel of every pixel's centre; 0 outside of the image."""
    H, W = levels.shape[2:]
    x, y = (torch.arange(side, dtype=torch.float32, device=levels.device) + 0.5 for side in (W, H))
    a, b, c, d, e, f = maps[:, :, None, None].unbind(1)
    column = (a * x + b * y[:, None] + c).floor()
    row = (d * x + e * y[:, None] + f).floor()
    inside = (column >= 0) & (column < W) & (row >= 0) & (row < H)
    source = (row.clamp(0, H - 1) * W + column.clamp(0, W - 1)).long().flatten(1)
    found = levels.flatten(2).gather(2, source[:, None].expand(-1, levels.shape[1], -1)).view(levels.shape)
    return found * inside[:, None]


# --- colours ---------------------------------------------------------------------------------------------------------
# Of levels (n, channels, H, W) uint8: a function of the signed strength (n, 1, 1, 1) and of the strength, 0 to 1.


def _blended(base: Tensor | float, levels: Tensor, signed: Tensor) -> Tensor:
    """base + (1 + 0.9 s) (levels - base), rounded and clamped."""
    factor = 1.0 + 0.9 * signed
    return (base + factor * (levels.float() - base)).round_().clamp_(0, 255).to(torch.uint8)


def _grey(levels: Tensor) -> Tensor:
    """(n, 1, H, W) float32, whole numbers: luminance of RGB, else the mean over channels."""
    if levels.shape[1] != 3:
        return levels.float().mean(1, keepdim=True).round_()
    red, green, blue = levels.float().unbind(1)
    return (0.299 * red + 0.587 * green + 0.114 * blue).round_().unsqueeze(1)


def _brightness(levels: Tensor, signed: Tensor, strength: float) -> Tensor:
    return _blended(0.0, levels, signed)


def _color(levels: Tensor, signed: Tensor, strength: float) -> Tensor:
    return _blended(_grey(levels), levels, signed)


def _contrast(levels: Tensor, signed: Tensor, strength: float) -> Tensor:
    return _blended(_grey(levels).mean((1, 2, 3), keepdim=True).round_(), levels, signed)


def _sharpness(levels: Tensor, signed: Tensor, strength: float) -> Tensor:
    """Base: the mean over 3 x 3 pixels with the central one counted five times; the border stays."""
    if min(levels.shape[2:]) < 3:
        return levels
    smooth = levels.float()
    inner = smooth[:, :, 1:-1, 1:-1]
    inner.copy_(((9 * F.avg_pool2d(smooth, 3, stride=1) + 4 * inner) / 13).round_())
    return _blended(smooth, levels, signed)


def _posterize(levels: Tensor, signed: Tensor, strength: float) -> Tensor:
    """Keep 8 to 4 bits."""
    dropped = round(4 * strength)
    return levels & (256 - (1 << dropped))


def _solarize(levels: Tensor, signed: Tensor, strength: float) -> Tensor:
    return torch.where(levels >= math.ceil(255 * (1 - strength)), 255 - levels, levels)


def _autocontrast(levels: Tensor, signed: Tensor, strength: float) -> Tensor:
    """Stretch each channel to all levels."""
    low, high = (reduce(levels, (2, 3), keepdim=True).int() for reduce in (torch.amin, torch.amax))
    stretched = (levels.int() - low) * 255 // (high - low).clamp(min=1)
    return torch.where(high > low, stretched, levels.int()).to(torch.uint8)


def _equalize(levels: Tensor, signed: Tensor, strength: float) -> Tensor:
    """Map each channel's levels so that their cumulative histogram is a straight line."""
    n, C, H, W = levels.shape
    rows = levels.reshape(n * C, H * W).long()
    at = (rows + 256 * torch.arange(n * C, device=levels.device)[:, None]).view(-1)
    histogram = torch.zeros(n * C * 256, dtype=torch.int64, device=levels.device)
    histogram.index_put_((at,), torch.ones_like(at), accumulate=True)
    histogram = histogram.view(n * C, 256)
    last = histogram.gather(1, rows.amax(1, keepdim=True))
    step = (H * W - last) // 255
    table = ((histogram.cumsum(1) - histogram + step // 2) // step.clamp(min=1)).clamp(0, 255)
    table = torch.where(step > 0, table, torch.arange(256, device=levels.device))
    return table.gather(1, rows).to(torch.uint8).view(n, C, H, W)


_APPLIED: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "brightness": _brightness,
    "color": _color,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}
