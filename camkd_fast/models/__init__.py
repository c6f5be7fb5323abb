"""The model zoo. Every model follows timm's protocol: forward_features(x), forward_head(features), num_features."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from functools import partial

from torch import nn

from . import resnet, timm_models, vgg, wide_resnet
from .frozen import freeze
from .mobilenet import MobileNetV2
from .shufflenet import ShuffleNetV1, ShuffleNetV2

# name -> (num_classes, in_channels) -> model
_ZOO: dict[str, Callable[[int, int], nn.Module]] = {
    **{name: partial(resnet.ResNet, shape) for name, shape in resnet.ARCHITECTURES.items()},
    **{name: partial(wide_resnet.WideResNet, shape) for name, shape in wide_resnet.ARCHITECTURES.items()},
    **{name: partial(vgg.VGG, blocks) for name, blocks in vgg.ARCHITECTURES.items()},
    "mobilenetv2": MobileNetV2,
    "shufflenetv1": ShuffleNetV1,
    "shufflenetv2": ShuffleNetV2,
}
# Spellings of RepDistiller and CA-MKD, where they differ.
_OFFICIAL = {
    **{name.replace("-", "_"): name for name in wide_resnet.ARCHITECTURES},
    "MobileNetV2": "mobilenetv2",
    "ShuffleV1": "shufflenetv1",
    "ShuffleV2": "shufflenetv2",
}


def names() -> tuple[str, ...]:
    """Names of the zoo's models, without timm's."""
    return tuple(_ZOO)


def zoo_name(name: str) -> str | None:
    """The zoo's name of a model that is spelled as here or as in RepDistiller and CA-MKD; None if it has no such model.

    The official spellings are `wrn_16_2` and the like, `MobileNetV2`, `ShuffleV1` and `ShuffleV2`.
    """
    name = _OFFICIAL.get(name, name)
    return name if name in _ZOO else None


def create(name: str, num_classes: int, in_channels: int = 3) -> nn.Module:
    """Create a model and draw its weights from torch's global generator.

    It has `num_features`, `num_classes`, `forward_features` (N, in_channels, H, W) -> (N, num_features, h, w),
    `forward_head` (N, num_features, h, w) -> (N, num_classes), and `forward`. Zoo models take images from 8x8 pixels.

    Args:
        name: one of `names()`, or its official spelling (`zoo_name`), "timm:NAME", or a name that only timm knows, when
            timm is installed.

    Raises:
        ValueError: a count is below 1, no model has that name (the message lists the nearest), timm is required but
            not installed, or the timm model has no feature map.
    """
    for what, count in (("num_classes", num_classes), ("in_channels", in_channels)):
        if count < 1:
            raise ValueError(f"{what} must be at least 1, got {count}")
    if known := zoo_name(name):
        return _ZOO[known](num_classes, in_channels)
    if name.startswith(timm_models.PREFIX) or timm_models.knows(name):
        return timm_models.create(name.removeprefix(timm_models.PREFIX), num_classes, in_channels)
    nearest = get_close_matches(name, [*_ZOO, *timm_models.names()], n=5) or names()
    raise ValueError(f"no model is called {name!r}; nearest: {', '.join(nearest)}")


__all__ = ["create", "freeze", "names", "zoo_name"]
