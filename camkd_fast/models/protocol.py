"""The interface of teachers and students, which is timm's, so that a timm model can be either; and trained models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, fx, nn


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


@dataclass(frozen=True)
class Source:
    """A trained model, and what is known about the images that it expects; None: unknown.

    Attributes:
        model: in evaluation mode, on the CPU. That of `sources.load` is a `FeatureModel`, whose `num_features` is 0 if
            its feature map is unknown (`split.LogitsOnly`).
        mean: of each channel, or one number for all, of images in [0, 1].
        std: likewise.
        size: (H, W) in pixels.
        classes: names in the order of the logits: those of the run's data, WordNet ids (timm), or descriptions
            (torchvision, transformers).
        architecture: name of the model, such as "resnet32x4" or "timm:resnet50".
    """

    model: nn.Module
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: tuple[int, int] | None = None
    classes: tuple[str, ...] | None = None
    architecture: str = ""

    @property
    def num_classes(self) -> int | None:
        """Number of logits; None if the model does not say it."""
        return getattr(self.model, "num_classes", None)


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
    """Features and logits in one pass; images (N, channels, height, width).

    Raises:
        ValueError: the head changes the feature map in place.
    """
    features = model.forward_features(images)
    if torch.compiler.is_compiling() or not isinstance(features, Tensor) or features.is_inference():
        return Prediction(features, model.forward_head(features))
    version = features._version
    logits = model.forward_head(features)
    if features._version != version:
        name = type(model).__name__
        raise ValueError(f"the head of {name} changes the feature map in place: expected modules with inplace=False")
    return Prediction(features, logits)


def logits_of(output: object) -> Tensor:
    """The logits of a model's output: the output itself, or its `logits` (transformers).

    Raises:
        TypeError: it is neither.
    """
    if isinstance(output, (Tensor, fx.Proxy)):  # a proxy: `freeze` traces the model
        return cast(Tensor, output)
    logits = getattr(output, "logits", None)
    if not isinstance(logits, (Tensor, fx.Proxy)):
        raise TypeError(f"a model must return logits or an object with logits, got {type(output).__name__}")
    return cast(Tensor, logits)


def device_of(module: nn.Module) -> torch.device:
    """Of the module's first parameter or buffer; the CPU without any."""
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def floating_dtype(module: nn.Module) -> torch.dtype:
    """Dtype of the module's first floating-point parameter or buffer; float32 without any."""
    tensors = (t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point())
    return next((t.dtype for t in tensors), torch.float32)
