"""Frozen teachers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn


class FeatureModel(Protocol):
    """timm's protocol, which the model zoo follows."""

    num_features: int

    def forward_features(self, x: Tensor) -> Tensor: ...
    def forward_head(self, features: Tensor) -> Tensor: ...


class Prediction(NamedTuple):
    """What a model says about one batch."""

    features: Tensor  # last feature map (N, D, H, W)
    logits: Tensor  # (N, C)


def predict(model: FeatureModel, images: Tensor) -> Prediction:
    features = model.forward_features(images)
    return Prediction(features, model.forward_head(features))


class Teachers:
    """K trained models in evaluation mode, whose parameters no gradient reaches."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self._models: list[FeatureModel] = []
        for model in models:
            model.eval().requires_grad_(False)
            self._models.append(model)  # type: ignore[arg-type]  # nn.Module hides the protocol's members

    @property
    def num_features(self) -> list[int]:
        """Channels D_k of each feature map."""
        return [model.num_features for model in self._models]

    @property
    def heads(self) -> list[Callable[[Tensor], Tensor]]:
        """forward_head of each: (N, D_k, H_k, W_k) -> (N, C)."""
        return [model.forward_head for model in self._models]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[Prediction]:
        return [predict(model, images) for model in self._models]
