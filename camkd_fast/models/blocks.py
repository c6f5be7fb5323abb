"""Parts shared by the model families: pooled linear classifier, convolution with batch norm, initialisation.

The names of module classes and attributes are part of saved weights and of teacher-cache hashes: renaming one breaks
both.
"""

from __future__ import annotations

from torch import Tensor, nn


class PooledClassifier(nn.Module):
    """Convolutional body, spatial mean and one linear layer behind timm's protocol.

    `forward_features` maps (N, in_channels, H, W) to the last feature map (N, num_features, h, w), `forward_head` maps
    that to logits (N, num_classes), and `forward` composes both. Images have at least 8x8 pixels.
    """

    def __init__(self, body: nn.Module, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.num_classes = num_classes
        self.body = body
        self.fc = nn.Linear(num_features, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        features: Tensor = self.body(x)
        return features

    def forward_head(self, features: Tensor) -> Tensor:
        logits: Tensor = self.fc(features.mean((2, 3)))
        return logits

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def conv_norm(in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """(N, in_channels, H, W) -> (N, channels, ceil(H / stride), ceil(W / stride)), for odd kernels."""
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(channels),
    )


def conv_norm_relu(in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return conv_norm(in_channels, channels, kernel, stride, groups).append(nn.ReLU(inplace=True))


def init_convolutions(model: nn.Module) -> None:
    """He normal initialisation by fan-out, in construction order, so that a seed determines every weight."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def init_small_classifier(model: PooledClassifier) -> None:
    """Initialise the classifier for logits near zero at any width, as published for VGG and MobileNetV2."""
    nn.init.normal_(model.fc.weight, std=0.01)
    nn.init.zeros_(model.fc.bias)
