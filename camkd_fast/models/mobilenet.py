"""MobileNetV2 at half width for CIFAR (Sandler et al., arXiv 1801.04381; "T=6, W=0.5" of arXiv 1910.10699).

Differences from the ImageNet model: ReLU instead of ReLU6, stride 1 in the second stage, and the first block keeps its
1x1 expansion although its factor is 1.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from .blocks import PooledClassifier, conv_norm, conv_norm_relu, init_convolutions, init_small_classifier

STEM = 16
LAST = 1280  # width of the last 1x1 convolution, the same at every model width


class Stage(NamedTuple):
    expansion: int
    channels: int  # at half width
    blocks: int
    stride: int  # of the first block


STAGES = (
    Stage(1, 8, 1, 1),
    Stage(6, 12, 2, 1),
    Stage(6, 16, 3, 2),
    Stage(6, 32, 4, 2),
    Stage(6, 48, 3, 1),
    Stage(6, 80, 3, 2),
    Stage(6, 160, 1, 1),
)


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3, linear 1x1 projection.

    (N, in_channels, H, W) -> (N, channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = expansion * in_channels
        self.layers = nn.Sequential(
            conv_norm_relu(in_channels, hidden, 1),
            conv_norm_relu(hidden, hidden, 3, stride, groups=hidden),
            conv_norm(hidden, channels, 1),
        )
        self.has_shortcut = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return x + out if self.has_shortcut else out


class MobileNetV2(PooledClassifier):
    """Feature map (N, 1280, H/16, W/16), rounded up."""

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        channels = STEM
        layers: list[nn.Module] = [conv_norm_relu(in_channels, channels, 3, stride=2)]
        for stage in STAGES:
            for block in range(stage.blocks):
                stride = stage.stride if block == 0 else 1
                layers.append(InvertedResidual(channels, stage.channels, stride, stage.expansion))
                channels = stage.channels
        layers.append(conv_norm_relu(channels, LAST, 1))
        super().__init__(nn.Sequential(*layers), LAST, num_classes)
        init_convolutions(self)
        init_small_classifier(self)
