"""Confusion matrices of several models on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data import choose
from ..data.batch import LoaderConfig
from ..data.files import ImageSet
from ..models.protocol import device_of
from .run_images import EVALUATION_BATCH


@dataclass(frozen=True)
class Confusion:
    """K models on N images of C classes."""

    counts: Tensor  # (K, C, C) int64: [k, c, d] images of class c that model k predicts as class d
    right: Tensor  # (K + 1,) int64: [m] images that exactly m models predict correctly

    def accuracy(self, k: int) -> float:
        return float(self.counts[k].trace() / self.counts[k].sum())

    def shares(self, k: int) -> list[list[float]]:
        """(C, C), each row sums to 1, or to 0 for a class without images."""
        counts: list[list[float]] = (self.counts[k] / self.counts[k].sum(1, keepdim=True).clamp(min=1)).tolist()
        return counts


@torch.no_grad()
def confusion(models: Sequence[nn.Module], images: ImageSet, loader: str = "auto", skip_bad: int = 0) -> Confusion:
    """Run the models, already in evaluation mode, on their own device.

    Args:
        images: unaugmented.
        loader: kind of loader, see `choose.loader`.
        skip_bad: unreadable files to skip before the loader raises.
    """
    device = device_of(models[0])
    C = images.num_classes
    counts = torch.zeros(len(models), C * C, dtype=torch.int64, device=device)
    right = torch.zeros(len(models) + 1, dtype=torch.int64, device=device)
    batches = choose.loader(images, LoaderConfig(EVALUATION_BATCH, device=device, skip_bad=skip_bad), loader)
    try:
        for batch in batches:
            answers = torch.stack([model(batch.images).argmax(1) for model in models])
            for k, cells in enumerate(batch.target * C + answers):
                counts[k] += torch.bincount(cells, minlength=C * C)
            right += torch.bincount((answers == batch.target).sum(0), minlength=len(models) + 1)
    finally:
        batches.close()
    return Confusion(counts.view(-1, C, C).cpu(), right.cpu())
