"""What a teacher or a student must offer: timm's protocol, so that any timm model can be either."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class FeatureModel(Protocol):
    """forward_head(forward_features(x)) are the logits; `num_features` counts the feature map's channels."""

    num_features: int

    def forward_features(self, x: Tensor) -> Tensor: ...
    def forward_head(self, features: Tensor) -> Tensor: ...


class Prediction(NamedTuple):
    """What a model says about one batch."""

    features: Tensor  # last feature map (N, D, H, W)
    logits: Tensor  # (N, C)


def feature_model(module: nn.Module) -> FeatureModel:
    """The module itself, once it is known to follow the protocol.

    Raises:
        TypeError: it does not.
    """
    if not isinstance(module, FeatureModel):
        wanted = "num_features, forward_features and forward_head"
        raise TypeError(f"{type(module).__name__} cannot teach or learn: it lacks one of {wanted}")
    return module


def predict(model: FeatureModel, images: Tensor) -> Prediction:
    """Features and logits in one pass; images (N, channels, height, width)."""
    features = model.forward_features(images)
    return Prediction(features, model.forward_head(features))
