"""timm models, wrapped to return a feature map (N, D, H, W). timm is optional and imported on use."""

from __future__ import annotations

import importlib
import math
from difflib import get_close_matches
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .protocol import feature_model

PREFIX = "timm:"


def names() -> list[str]:
    """Names of timm's models; empty if timm is not installed."""
    timm = _timm()
    return list(timm.list_models()) if timm else []


def knows(name: str) -> bool:
    timm = _timm()
    return timm is not None and bool(timm.is_model(name))


def create(name: str, num_classes: int, in_channels: int = 3) -> nn.Module:
    """Create a timm model with random weights, wrapped unless its features are (N, D, H, W).

    The layout of the features is found by running one image of the model's default size.

    Raises:
        ValueError: timm is not installed or has no such model, the features are not a map, or the head reads values
            outside the map, such as a class token.
    """
    timm = _timm()
    if timm is None:
        raise ValueError(f"model {PREFIX + name!r} needs timm, which is not installed (pip install timm)")
    if not timm.is_model(name):
        nearest = get_close_matches(name, timm.list_models(), n=5)
        raise ValueError(f"timm has no model {name!r}; nearest: {', '.join(nearest) or 'none'}")
    settings = {"pretrained": False, "num_classes": num_classes, "in_chans": in_channels}
    model = timm.create_model(name, **settings)
    prefix = int(getattr(model, "num_prefix_tokens", 0))
    if prefix:
        # A map has no place for class tokens, so the head must average the patches.
        try:
            model = timm.create_model(name, **settings, global_pool="avg")
        except (AssertionError, TypeError) as error:
            raise ValueError(
                f"timm's {name} cannot average its patches: its head reads {prefix} class tokens"
            ) from error
    feature_model(model)
    shape = _features_shape(model, in_channels)
    if len(shape) == 4 and shape[1] == model.num_features:
        return model  # type: ignore[no-any-return]
    if len(shape) == 4 and shape[3] == model.num_features:
        return TrailingChannels(model)
    side = math.isqrt(max(0, shape[1] - prefix)) if len(shape) == 3 else 0
    if side == 0 or shape != (1, prefix + side**2, model.num_features):
        raise ValueError(f"timm's {name} has no feature map: one square image gives features {tuple(shape)}")
    wrapped = PatchTokens(model, prefix, side)
    if not wrapped.head_ignores_prefix():
        raise ValueError(
            f"timm's {name} has no feature map: its head reads {prefix} tokens outside the {side}x{side} map"
        )
    return wrapped


class TrailingChannels(nn.Module):
    """Wraps a timm model with features (N, H, W, D), such as Swin, to return (N, D, H, W)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.num_features: int = model.num_features
        self.num_classes: int = model.num_classes

    def forward_features(self, x: Tensor) -> Tensor:
        features: Tensor = self.model.forward_features(x)
        return features.permute(0, 3, 1, 2)

    def forward_head(self, features: Tensor) -> Tensor:
        logits: Tensor = self.model.forward_head(features.permute(0, 2, 3, 1))
        return logits

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class PatchTokens(nn.Module):
    """Wraps a timm model with tokens (N, prefix + side^2, D) as features, such as ViT, to return (N, D, side, side).

    The head gets zeros as prefix tokens, which it must not read. The image size must give side^2 patches.
    """

    def __init__(self, model: Any, prefix: int, side: int) -> None:
        super().__init__()
        self.model = model
        self.prefix, self.side = prefix, side
        self.num_features: int = model.num_features
        self.num_classes: int = model.num_classes

    def forward_features(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.model.forward_features(x)
        return torch.unflatten(tokens[:, self.prefix :].transpose(1, 2), 2, (self.side, self.side))

    def forward_head(self, features: Tensor) -> Tensor:
        patches = features.flatten(2).transpose(1, 2)
        prefix = patches.new_zeros(patches.shape[0], self.prefix, self.num_features)
        logits: Tensor = self.model.forward_head(torch.cat([prefix, patches], 1))
        return logits

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    @torch.no_grad()
    def head_ignores_prefix(self) -> bool:
        """True if prefix tokens of ones give the same logits as the zeros of `forward_head`."""
        self.eval()
        # A pattern without symmetry. Random numbers would change the state of the caller's generator.
        count = self.side**2 * self.num_features
        patches = torch.linspace(-1, 1, count).sin().view(1, self.side**2, self.num_features)
        ones = torch.ones(1, self.prefix, self.num_features)
        direct = self.model.forward_head(torch.cat([ones, patches], 1))
        same = torch.equal(
            direct, self.forward_head(torch.unflatten(patches.transpose(1, 2), 2, (self.side, self.side)))
        )
        self.train()
        return same


def _timm() -> ModuleType | None:
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError:
        return None


@torch.no_grad()
def _features_shape(model: Any, in_channels: int) -> torch.Size:
    size = (model.pretrained_cfg or {}).get("input_size", (3, 224, 224))[1:]
    model.eval()
    shape: torch.Size = model.forward_features(torch.zeros(1, in_channels, *size)).shape
    model.train()
    return shape
