"""Random erasing (arXiv 1708.04896): a random box of a normalised image becomes 0, the mean of the data set.

Areas and shapes of boxes are torchvision's: 2 % to 33 % of the image, height over width from 0.3 to 3.3.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .counter_random import key, uniforms

_ERASING = 4  # stream number, see `augment`
_TRIES = 10
_AREA, _RATIO = (0.02, 0.33), (0.3, 3.3)


def boxes(probability: float, seed: int, view: int, index: NDArray[np.int64], H: int, W: int) -> NDArray[np.int64]:
    """(n, 4) top, left, bottom, right of the samples `index` (n,) in one view; empty where nothing is erased."""
    uniform = uniforms(key(_ERASING, seed, view), index, 3 + 2 * _TRIES)
    chosen, position = uniform[:, 0] < probability, uniform[:, 1:3]
    area = H * W * (_AREA[0] + (_AREA[1] - _AREA[0]) * uniform[:, 3 : 3 + _TRIES])
    low, high = np.log(_RATIO)
    ratio = np.exp(low + (high - low) * uniform[:, 3 + _TRIES :])
    tried = np.stack([np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))])  # (2, n, tries)
    fits = (tried[0] < H) & (tried[1] < W)
    sides = tried[:, np.arange(len(index)), fits.argmax(1)].T * (chosen & (fits.sum(1) > 0))[:, None]
    corners = np.floor(position * (np.array([H, W]) - sides + 1))
    return np.concatenate([corners, corners + sides], 1).astype(np.int64)


def erase(images: Tensor, boxes: Tensor) -> Tensor:
    """Fill the boxes (n, 4) of images (n, channels, H, W) with 0, in place; both on one device."""
    H, W = images.shape[2:]
    rows, columns = (torch.arange(side, device=images.device) for side in (H, W))
    top, left, bottom, right = boxes[:, :, None].unbind(1)
    inside_rows = (rows >= top) & (rows < bottom)
    inside_columns = (columns >= left) & (columns < right)
    return images.masked_fill_((inside_rows[:, :, None] & inside_columns[:, None])[:, None], 0.0)
