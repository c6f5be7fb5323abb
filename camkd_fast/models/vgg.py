"""CIFAR VGGs: five blocks of 3x3 convolutions with batch norm, one linear layer (Simonyan and Zisserman,
arXiv 1409.1556, reduced as in Tian et al., arXiv 1910.10699).

The convolutions keep the bias that batch norm makes redundant: the published parameter counts include it.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import PooledClassifier, init_convolutions, init_small_classifier

_WIDTHS = (64, 128, 256, 512, 512)


def _blocks(*convolutions: int) -> tuple[tuple[int, ...], ...]:
    return tuple((width,) * count for width, count in zip(_WIDTHS, convolutions, strict=True))


# Channels of each convolution of each block; the name counts them and the linear layers of the original's head.
ARCHITECTURES = {
    "vgg8": _blocks(1, 1, 1, 1, 1),
    "vgg11": _blocks(1, 1, 2, 2, 2),
    "vgg13": _blocks(2, 2, 2, 2, 2),
    "vgg16": _blocks(2, 2, 3, 3, 3),
    "vgg19": _blocks(2, 2, 4, 4, 4),
}


class LargeMapPool(nn.Module):
    """Halves maps from 8x8, so that 64x64 images end at 4x4, like 32x32 images, and 8x8 images at 1x1."""

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2) if min(x.shape[2:]) >= 8 else x


class VGG(PooledClassifier):
    """Feature map (N, 512, H/8, W/8), rounded down; H/16 from 64x64 on."""

    def __init__(self, blocks: tuple[tuple[int, ...], ...], num_classes: int, in_channels: int = 3) -> None:
        channels = in_channels
        layers: list[nn.Module] = []
        for block, widths in enumerate(blocks):
            if block > 0:
                layers.append(LargeMapPool() if block == 4 else nn.MaxPool2d(2))
            for width in widths:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
        super().__init__(nn.Sequential(*layers), channels, num_classes)
        init_convolutions(self)
        init_small_classifier(self)
