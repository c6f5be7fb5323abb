"""CIFAR ResNets: three stages of basic blocks after a 3x3 stem (He et al. 2016, section 4.2; arXiv 1512.03385).

Shortcuts that change shape are 1x1 convolutions with batch norm, and the x4 variants widen stem and stages, as in the
distillation literature (Tian et al., arXiv 1910.10699), whose parameter counts these reproduce.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import PooledClassifier, conv_norm, conv_norm_relu, init_convolutions


class Architecture(NamedTuple):
    """depth = 6 * blocks + 2."""

    blocks: int  # in each of the three stages
    widths: tuple[int, int, int, int]  # channels of the stem and of the three stages


_NARROW = (16, 16, 32, 64)
_WIDE = (32, 64, 128, 256)

ARCHITECTURES = {
    "resnet8": Architecture(1, _NARROW),
    "resnet14": Architecture(2, _NARROW),
    "resnet20": Architecture(3, _NARROW),
    "resnet32": Architecture(5, _NARROW),
    "resnet44": Architecture(7, _NARROW),
    "resnet56": Architecture(9, _NARROW),
    "resnet110": Architecture(18, _NARROW),
    "resnet8x4": Architecture(1, _WIDE),
    "resnet20x4": Architecture(3, _WIDE),
    "resnet32x4": Architecture(5, _WIDE),
}


class BasicBlock(nn.Module):
    """Shortcut block with two 3x3 convolutions: (N, D_in, H, W) -> (N, D_out, ceil(H / stride), ceil(W / stride))."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        # The name is a key of saved weights.
        self.residual = nn.Sequential(
            conv_norm_relu(in_channels, channels, 3, stride),
            conv_norm(channels, channels, 3),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = conv_norm(in_channels, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(x) + self.shortcut(x), inplace=True)


class ResNet(PooledClassifier):
    """Feature map (N, widths[-1], H/4, W/4), rounded up."""

    def __init__(self, architecture: Architecture, num_classes: int, in_channels: int = 3) -> None:
        channels, *stages = architecture.widths
        layers: list[nn.Module] = [conv_norm_relu(in_channels, channels, 3)]
        for stage, width in enumerate(stages):
            for block in range(architecture.blocks):
                layers.append(BasicBlock(channels, width, stride=2 if stage > 0 and block == 0 else 1))
                channels = width
        super().__init__(nn.Sequential(*layers), channels, num_classes)
        init_convolutions(self)
