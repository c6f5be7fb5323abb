"""ShuffleNets for CIFAR: V1 with 3 groups (Zhang et al., arXiv 1707.01083), V2 at 1x (Ma et al., arXiv 1807.11164).

Differences from the ImageNet models, as in the distillation literature (arXiv 1910.10699): the stem is a 1x1
convolution without stride or pooling, and V1's depthwise convolution has a ReLU. The initialisation is PyTorch's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import PooledClassifier, conv_norm, conv_norm_relu

STEM = 24
V1_GROUPS = 3
V1_STAGES = ((240, 4), (480, 8), (960, 4))  # channels, blocks
V2_STAGES = ((116, 4), (232, 8), (464, 4))
V2_LAST = 1024


class ChannelShuffle(nn.Module):
    """Move channel i of group j to channel j of group i, in one copy that keeps the memory format.

    A reshape of the NCHW view would return channels_last input in the default format, which the next convolution would
    have to convert back.
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        if x.is_contiguous(memory_format=torch.channels_last):
            pixels = x.permute(0, 2, 3, 1)
            return torch.unflatten(pixels, 3, (self.groups, -1)).transpose(3, 4).flatten(3).permute(0, 3, 1, 2)
        return torch.unflatten(x, 1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)


class GroupedBottleneck(nn.Module):
    """Unit of V1: grouped 1x1, shuffle, depthwise 3x3, grouped 1x1.

    Stride 1 adds the input. Stride 2 concatenates the average-pooled input, so the convolutions produce
    channels - in_channels channels: (N, in_channels, H, W) -> (N, channels, ceil(H / 2), ceil(W / 2)).
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        convolved = channels - in_channels if stride == 2 else channels
        hidden = convolved // 4
        groups = 1 if in_channels == STEM else V1_GROUPS  # the stem has too few channels to be split
        self.layers = nn.Sequential(
            conv_norm_relu(in_channels, hidden, 1, groups=groups),
            ChannelShuffle(groups) if groups > 1 else nn.Identity(),
            conv_norm_relu(hidden, hidden, 3, stride, groups=hidden),
            conv_norm(hidden, convolved, 1, groups=V1_GROUPS),
        )
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return F.relu(out + x if self.pool is None else torch.cat([out, self.pool(x)], 1), inplace=True)


class ShuffleNetV1(PooledClassifier):
    """Feature map (N, 960, H/8, W/8), rounded up."""

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        channels = STEM
        layers: list[nn.Module] = [conv_norm_relu(in_channels, channels, 1)]
        for width, blocks in V1_STAGES:
            for block in range(blocks):
                layers.append(GroupedBottleneck(channels, width, stride=2 if block == 0 else 1))
                channels = width
        super().__init__(nn.Sequential(*layers), channels, num_classes)


def _branch(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    """1x1, depthwise 3x3, 1x1."""
    return nn.Sequential(
        conv_norm_relu(in_channels, channels, 1),
        conv_norm(channels, channels, 3, stride, groups=channels),
        conv_norm_relu(channels, channels, 1),
    )


class SplitUnit(nn.Module):
    """Unit of V2 with stride 1: half of the channels are kept, half are convolved, then all are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = _branch(channels // 2, channels // 2, stride=1)
        self.shuffle = ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        kept, convolved = x.chunk(2, 1)
        out: Tensor = self.shuffle(torch.cat([kept, self.branch(convolved)], 1))
        return out


class DownUnit(nn.Module):
    """Unit of V2 with stride 2, two branches on all channels: (N, D, H, W) -> (N, channels, ceil(H/2), ceil(W/2))."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.short = nn.Sequential(
            conv_norm(in_channels, in_channels, 3, stride=2, groups=in_channels),
            conv_norm_relu(in_channels, channels // 2, 1),
        )
        self.branch = _branch(in_channels, channels // 2, stride=2)
        self.shuffle = ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.shuffle(torch.cat([self.short(x), self.branch(x)], 1))
        return out


class ShuffleNetV2(PooledClassifier):
    """Feature map (N, 1024, H/8, W/8), rounded up."""

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        channels = STEM
        layers: list[nn.Module] = [conv_norm_relu(in_channels, channels, 1)]
        for width, units in V2_STAGES:
            layers.append(DownUnit(channels, width))
            layers += [SplitUnit(width) for _ in range(units - 1)]
            channels = width
        layers.append(conv_norm_relu(channels, V2_LAST, 1))
        super().__init__(nn.Sequential(*layers), V2_LAST, num_classes)
