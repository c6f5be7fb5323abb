"""Handwritten digits: 1797 images of 8x8 pixels from scikit-learn (the test part of UCI optdigits)."""

from __future__ import annotations

import torch

from .images import LabelledImages, stratified_parts
from .splits import Splits

TRAIN, VALIDATION, TEST = 900, 300, 597
NAMES = tuple("0123456789")


def load_digits(seed: int = 0) -> Splits:
    """Load the 1797 digits, split by `seed` into 900 + 300 + 597 images (N, 1, 8, 8) with 17 grey levels
    from 0 to 255.

    Mean and standard deviation come from the training split. Requires scikit-learn; nothing is downloaded.
    """
    from sklearn.datasets import load_digits as load

    bunch = load()
    pixels = (torch.from_numpy(bunch.images) * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    parts = stratified_parts(labels, (TRAIN, VALIDATION, TEST), seed)
    levels = pixels[parts[0]].double()
    images = LabelledImages(pixels, labels, 10, (levels.mean().item(),), (levels.std().item(),), NAMES)
    return Splits(*(images.take(part) for part in parts))
