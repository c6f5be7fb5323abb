"""Frozen teachers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..models.protocol import Prediction, feature_model, predict


class Teachers:
    """K trained models in evaluation mode, whose parameters no gradient reaches."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self._models = [feature_model(model.eval().requires_grad_(False)) for model in models]

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
