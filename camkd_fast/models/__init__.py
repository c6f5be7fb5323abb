"""The model zoo. Every model follows timm's protocol: forward_features(x), forward_head(features), num_features."""

from __future__ import annotations

from .resnet import ARCHITECTURES, ResNet


def create(name: str, num_classes: int, in_channels: int = 3) -> ResNet:
    """A freshly initialised model from torch's global generator.

    Args:
        name: "resnet8", "resnet20", "resnet8x4", ... (`camkd_fast.models.resnet.ARCHITECTURES`).

    Raises:
        ValueError: no model has that name.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"model must be one of {', '.join(ARCHITECTURES)}, got {name!r}")
    return ResNet(ARCHITECTURES[name], num_classes, in_channels)


__all__ = ["ResNet", "create"]
