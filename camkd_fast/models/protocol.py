"""The interface of teachers and students: timm's protocol, so that a timm model can be either."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class FeatureModel(Protocol):
    """forward_head(forward_features(x)) gives the logits; `num_features` is the feature map's number of channels."""

    num_features: int

    def forward_features(self, x: Tensor) -> Tensor: ...
    def forward_head(self, features: Tensor) -> Tensor: ...


class Prediction(NamedTuple):
    """Outputs of a model for one batch."""

    features: Tensor  # last feature map (N, D, H, W)
    logits: Tensor  # (N, C)


def feature_model(module: nn.Module) -> FeatureModel:
    """Return the module after checking that it follows the protocol.

    Raises:
        TypeError: it lacks an attribute; the message names the missing ones.
    """
    if not isinstance(module, FeatureModel):
        required = ("num_features", "forward_features", "forward_head")
        missing = ", ".join(name for name in required if not hasattr(module, name))
        raise TypeError(f"{type(module).__name__} can be neither a teacher nor a student: it lacks {missing}")
    return module


def predict(model: FeatureModel, images: Tensor) -> Prediction:
    """Features and logits in one pass; images (N, channels, height, width)."""
    features = model.forward_features(images)
    return Prediction(features, model.forward_head(features))
