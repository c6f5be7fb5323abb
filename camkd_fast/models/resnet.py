"""CIFAR ResNets: three stages of basic blocks behind a 3x3 stem (He et al. 2016, section 4.2; arXiv 1512.03385).

Shortcuts that change shape are 1x1 convolutions with batch norm, and the x4 variants widen stem and stages, as in the
distillation literature (Tian et al., arXiv 1910.10699), whose parameter counts these reproduce.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


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
    "resnet56": Architecture(9, _NARROW),
    "resnet8x4": Architecture(1, _WIDE),
    "resnet32x4": Architecture(5, _WIDE),
}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (N, D_in, H, W) -> (N, D_out, H / stride, W / stride)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x), inplace=True)


class ResNet(nn.Module):
    """A CIFAR ResNet for images of 8x8 and more, with timm's protocol.

    `forward_features` maps (N, in_channels, H, W) to (N, num_features, H/4, W/4) and `forward_head` that to logits
    (N, num_classes); `num_features` is the channel count that feature distillation asks for.
    """

    def __init__(self, architecture: Architecture, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        stem, *stages = architecture.widths
        self.num_classes = num_classes
        self.num_features = stages[-1]
        self.conv1 = nn.Conv2d(in_channels, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        blocks: list[nn.Module] = []
        channels = stem
        for stage, width in enumerate(stages):
            for block in range(architecture.blocks):
                blocks.append(BasicBlock(channels, width, stride=2 if stage > 0 and block == 0 else 1))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(F.relu(self.bn1(self.conv1(x)), inplace=True))
        return out

    def forward_head(self, features: Tensor) -> Tensor:
        logits: Tensor = self.fc(features.mean((2, 3)))
        return logits

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
