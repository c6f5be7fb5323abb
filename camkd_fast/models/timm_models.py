"""timm models, wrapped to return a feature map (N, D, H, W). timm is optional and imported on use."""

from __future__ import annotations

import importlib
import math
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import first_sentence
from . import checkpoint_files
from .protocol import Source, TrailingChannels, feature_model, has_trailing_channels
from .split import LogitsOnly
from .weights import fill, size

PREFIX = "timm:"


class SeveralTensorsError(ValueError):
    """The features of a model are several tensors."""


def names() -> list[str]:
    """Names of timm's models; empty if timm is not installed."""
    timm = _timm()
    return list(timm.list_models()) if timm else []


def knows(name: str) -> bool:
    timm = _timm()
    return timm is not None and bool(timm.is_model(name))


def create(name: str, num_classes: int, in_channels: int = 3) -> nn.Module:
    """Create a timm model with random weights, wrapped unless its features are (N, D, H, W).

    The layout of the features is found by running one image of the model's default size. A model with several tensors
    as features, such as CrossViT, is used for its logits only.

    Raises:
        ValueError: timm is not installed or has no such model, the features are one tensor but no map, or the head
            reads values outside the map, such as a class token.
    """
    timm = _required(name)
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
    try:
        return with_map(model, name, in_channels)
    except SeveralTensorsError as error:
        return LogitsOnly(model, str(error))


def with_map(model: Any, name: str, in_channels: int = 3) -> nn.Module:
    """The model, wrapped unless its features are (N, D, H, W), in training mode.

    The layout of the features is found by running one image of the model's default size.

    Raises:
        SeveralTensorsError: the features are several tensors.
        ValueError: they are not a map, or the head reads values outside the map, such as a class token.
    """
    prefix = int(getattr(model, "num_prefix_tokens", 0))
    feature_model(model)
    features = _features(model, in_channels)
    if not isinstance(features, Tensor):
        what = f"a {type(features).__name__} of {len(features)} tensors"
        raise SeveralTensorsError(f"timm's {name} has no feature map: the features of an image are {what}")
    shape = features.shape
    if len(shape) == 4 and shape[1] == model.num_features:
        return model  # type: ignore[no-any-return]
    if has_trailing_channels(features, model.num_features):
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


def pretrained(name: str, file: Path | None = None) -> Source:
    """A timm model with its pretrained weights, from timm's hub or its cache, or with those of a file.

    It may lack a feature map (`with_map`). Classes of the pretrained weights have ImageNet's WordNet ids as names, if
    they are ImageNet's; those of a file have none.

    Args:
        file: state dict under timm's names, see `checkpoint_files.read`. It decides the number of classes.

    Raises:
        OSError: the file cannot be read.
        ValueError: timm is not installed or has no such model; there are no pretrained weights, they can be neither
            found nor downloaded, or they are damaged or would run code; or the file is refused or does not fit.
    """
    timm = _required(name)
    if file is None:
        model = _downloaded(timm, name)
        config = model.pretrained_cfg
        classes = config.get("label_names") or _imagenet(timm, model)
    else:
        tensors = checkpoint_files.read(file)
        model = timm.create_model(name, pretrained=False)
        config, classes = model.pretrained_cfg, None
        head = config.get("classifier")
        head = head[0] if isinstance(head, (tuple, list)) else head  # two, if one is for distillation
        if f"{head}.weight" in tensors:
            model.reset_classifier(size(tensors, f"{head}.weight", 0))
        fill(model, tensors, PREFIX + name, file)
    mean, std = (tuple(map(float, config[key])) for key in ("mean", "std"))
    height, width = config["input_size"][1:]
    return Source(model.eval(), mean, std, (height, width), tuple(classes) if classes else None)


def _downloaded(timm: ModuleType, name: str) -> Any:
    """The model with its pretrained weights, in timm's cache from then on."""
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError:  # no such tag
        config = None
    if config is None or not config.has_weights:
        published = timm.list_pretrained()
        tags = [other for other in published if other.startswith(f"{name.partition('.')[0]}.")]
        nearest = get_close_matches(name, tags or published, n=5) or tags[:5] or ["none"]
        raise ValueError(f"timm has no pretrained weights {name!r}; nearest: {', '.join(nearest)}")
    try:
        return timm.create_model(name, pretrained=True)
    except OSError as error:
        hub = config.hf_hub_id
        what = f"model.safetensors of huggingface.co/{hub}" if hub else config.url
        raise ValueError(
            f"the weights of {PREFIX}{name} are not in the cache and cannot be downloaded: download {what} on another "
            f"machine, copy it to any folder here, and give {PREFIX}{name}@FILE"
        ) from error
    except Exception as error:  # of several libraries
        reason = first_sentence(error)
        raise ValueError(f"the weights of {PREFIX}{name} are refused or damaged: {reason}") from error


def _imagenet(timm: ModuleType, model: Any) -> list[str] | None:
    """WordNet ids of the classes, if their number is an ImageNet's."""
    data = importlib.import_module("timm.data")
    subset = data.infer_imagenet_subset(model)
    return data.ImageNetInfo(subset).label_names() if subset else None


def _required(name: str) -> ModuleType:
    """timm, which has a model of that name.

    Raises:
        ValueError: it is not installed, or has none.
    """
    timm = _timm()
    if timm is None:
        raise ValueError(
            f"model {PREFIX + name!r} needs timm, which is not installed (pip install 'camkd-fast[teachers]')"
        )
    if not timm.is_model(name):
        nearest = get_close_matches(name, timm.list_models(), n=5)
        raise ValueError(f"timm has no model {name!r}; nearest: {', '.join(nearest) or 'none'}")
    return timm


def _timm() -> ModuleType | None:
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError:
        return None


@torch.no_grad()
def _features(model: Any, in_channels: int) -> Any:
    """Features of one image of the model's default size; leaves the model in training mode."""
    size = (model.pretrained_cfg or {}).get("input_size", (3, 224, 224))[1:]
    model.eval()
    features = model.forward_features(torch.zeros(1, in_channels, *size))
    model.train()
    return features
