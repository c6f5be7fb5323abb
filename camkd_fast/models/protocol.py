"""The interface of teachers and students, which is timm's, so that a timm model can be either; and trained models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, fx, nn

from .recorded import recorded, version_of


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


class Wrapper(nn.Module):
    """Base of modules that change the images before a model, or its map or logits after it."""

    model: FeatureModel
    num_features: int

    def before(self, x: Tensor) -> Tensor:
        """Images as the model gets them."""
        return x

    def after(self, logits: Tensor) -> Tensor:
        """Logits from those of the model."""
        return logits

    def outer(self, features: Tensor) -> Tensor:
        """The map (N, D, h, w) from that of the model."""
        return features

    def inner(self, features: Tensor) -> Tensor:
        """The model's map from a map (N, D, h, w)."""
        return features

    def forward_features(self, x: Tensor) -> Tensor:
        return self.outer(self.model.forward_features(self.before(x)))

    def forward_head(self, features: Tensor) -> Tensor:
        return self.after(self.model.forward_head(self.inner(features)))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(predict(self.model, self.before(x)).logits)


class TrailingChannels(Wrapper):
    """A model with features (N, h, w, D), such as timm's Swin, as one with a map (N, D, h, w)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = feature_model(model)
        self.num_features = self.model.num_features
        if hasattr(model, "num_classes"):
            self.num_classes = model.num_classes
        self.training = model.training

    def outer(self, features: Tensor) -> Tensor:
        return channels_first(features)

    def inner(self, features: Tensor) -> Tensor:
        return features.permute(0, 2, 3, 1)


def has_trailing_channels(features: object, channels: int) -> bool:
    """Whether features are a map (N, h, w, D) with these channels D, and by their shape no map (N, D, h, w)."""
    return isinstance(features, Tensor) and features.dim() == 4 and features.shape[1] != channels == features.shape[3]


def channels_first(features: Tensor) -> Tensor:
    """A map (N, D, h, w) from one of (N, h, w, D); what is no map, such as a list, as it is."""
    if isinstance(features, fx.Proxy) or (isinstance(features, Tensor) and features.dim() == 4):
        return features.permute(0, 3, 1, 2)  # of a proxy too: `freeze` traces the model
    return features


def unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """A model, and from outside to inside the models in this package's wrappers."""
    yield model
    while type(model).__module__.startswith("camkd_fast.") and isinstance(getattr(model, "model", None), nn.Module):
        model = cast(nn.Module, model.model)
        yield model


def inner_model(model: nn.Module) -> nn.Module:
    """The user's model in this package's wrappers, which are no part of its parameters' names."""
    *_, inner = unwrapped(model)
    return inner


def predict(model: FeatureModel, images: Tensor, learns: bool = False) -> Prediction:
    """Features and logits of `model(images)` in one pass; images (N, channels, height, width).

    Where a call is known to be forward_head(forward_features(images)), these are called. Otherwise, such as with hooks
    on the model, in a subclass with its own forward and in a compiled model, the model is called, and what its
    `forward_features` returns is recorded; without exactly one call of that the features are empty.

    Args:
        learns: whether the model learns from its feature map.

    Raises:
        ValueError: the head changes the feature map in place, or the model learns from a map that was computed without
            gradients, although the logits have one.
    """
    if isinstance(model, Wrapper) and _has_known_forward(model):
        features, logits = predict(model.model, model.before(images), learns)
        return Prediction(model.outer(features), model.after(logits))
    if composes(model):
        features = model.forward_features(images)
        version = version_of(features)
        logits = model.forward_head(features)
        _check_unchanged(model, features, version)
        return Prediction(features, logits)
    owner, wrappers = _owner(model)
    run = cast(Callable[[Tensor], object], model)
    output, (maps,) = recorded(lambda: run(images), [(owner, "forward_features")])
    logits = logits_of(output)
    if len(maps) != 1:
        return Prediction(images.new_empty(0), logits)
    if learns and torch.is_grad_enabled() and logits.requires_grad and not maps[0].learns:
        raise ValueError(no_gradient(f"{type(owner).__name__}.forward_features"))
    _check_unchanged(owner, maps[0].output, maps[0].version)
    features = maps[0].output
    for wrapper in reversed(wrappers):
        features = wrapper.outer(features)
    return Prediction(features, logits)


def _owner(model: FeatureModel) -> tuple[Any, list[Wrapper]]:
    """The module whose `forward_features` a call of the model runs, and the wrappers around it."""
    owner: Any = model
    wrappers: list[Wrapper] = []
    while True:
        if "forward_features" not in owner.__dict__:  # in a compiled model it is that of the one that was compiled
            owner = getattr(owner.forward_features, "__self__", owner)
        if not isinstance(owner, Wrapper):
            return owner, wrappers
        wrappers.append(owner)
        owner = owner.model


def composes(model: FeatureModel) -> bool:
    """Whether `model(x)` is known to be forward_head(forward_features(x)) only, as in this package and timm."""
    return _has_known_forward(model) and (not isinstance(model, Wrapper) or composes(model.model))


def _has_known_forward(model: FeatureModel) -> bool:
    """Whether a call of the model runs the forward of a class of this package or timm, and nothing else."""
    module = cast(nn.Module, model)
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    if any(hooks) or "forward" in module.__dict__ or module._compiled_call_impl is not None:
        return False
    forward = type(module).forward
    return forward is nn.Module.forward or getattr(forward, "__module__", "").startswith(("camkd_fast.", "timm."))


def _check_unchanged(model: FeatureModel, features: Tensor, version: int | None) -> None:
    if version is not None and version_of(features) != version:
        name = type(model).__name__
        raise ValueError(f"the head of {name} changes the feature map in place: expected modules with inplace=False")


def no_gradient(name: str) -> str:
    """The error of a feature map that gives the model no gradient."""
    return (
        f"{name} runs without gradients, although the logits have one, so that a feature loss could not train what is "
        "before it: expected no torch.no_grad, and checkpoints with use_reentrant=False"
    )


@torch.no_grad()
def head_makes(logits: Tensor, head: Callable[[Tensor], Tensor], features: Tensor) -> bool:
    """Whether the head makes these logits of a feature map, up to rounding in half precision."""
    made, logits = head(features).float(), logits.float()
    if made.shape != logits.shape:
        return False
    return not logits.numel() or not (made - logits).abs().max() > 0.05 * logits.abs().max()  # true of NaN


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
    """Device of the module's first parameter or buffer; the CPU if it has none."""
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def floating_dtype(module: nn.Module) -> torch.dtype:
    """Dtype of the module's first floating-point parameter or buffer; float32 if it has none."""
    tensors = (t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point())
    return next((t.dtype for t in tensors), torch.float32)
