"""Wide ResNets for CIFAR: pre-activation basic blocks, widened (Zagoruyko and Komodakis, arXiv 1605.07146).

No dropout, as in the distillation literature. The feature map is taken after the last batch norm and ReLU, so that the
head is pooling and one linear layer, as in every other family.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import PooledClassifier, init_convolutions


class Architecture(NamedTuple):
    """wrn-DEPTH-WIDEN."""

    depth: int  # 6 * blocks per stage + 4
    widen: int  # stages of 16, 32 and 64 channels times this


ARCHITECTURES = {
    "wrn-16-1": Architecture(16, 1),
    "wrn-16-2": Architecture(16, 2),
    "wrn-40-1": Architecture(40, 1),
    "wrn-40-2": Architecture(40, 2),
}


class PreActivationBlock(nn.Module):
    """Batch norm, ReLU, 3x3 convolution, twice: (N, D_in, H, W) -> (N, D_out, ceil(H / stride), ceil(W / stride)).

    The shortcut is the raw input, or a 1x1 convolution of the activated input if the channel count changes.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x), inplace=True)
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active)), inplace=True))
        return out + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(PooledClassifier):
    """Feature map (N, 64 * widen, H/4, W/4), rounded up."""

    def __init__(self, architecture: Architecture, num_classes: int, in_channels: int = 3) -> None:
        channels = 16
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)]
        for stage in range(3):
            width = 16 * 2**stage * architecture.widen
            for block in range((architecture.depth - 4) // 6):
                layers.append(PreActivationBlock(channels, width, stride=2 if stage > 0 and block == 0 else 1))
                channels = width
        layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        super().__init__(nn.Sequential(*layers), channels, num_classes)
        init_convolutions(self)
        nn.init.zeros_(self.fc.bias)
