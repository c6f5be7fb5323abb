"""Outputs of a student of any class: its logits, and the output of one of its modules as the feature map."""

from __future__ import annotations

from difflib import get_close_matches

import torch
from torch import Tensor, nn

from .layer_hook import LayerHook
from .protocol import (
    FeatureModel,
    Prediction,
    channels_first,
    floating_dtype,
    has_trailing_channels,
    logits_of,
    no_gradient,
    predict,
)
from .recorded import TRACES_REMOVAL, recorded


class Observer:
    """Calls a model and returns logits and feature map.

    The map is that of the model's own protocol (`models.protocol`), or the output of a named module, which is recorded
    during the call and copied: what follows may change it in place, in training only too. Without either it is empty.
    The model itself is not wrapped, so its parameters and its state keep their names.

    Args:
        model: images (N, channels, H, W) -> logits (N, C), or an object whose `logits` they are (transformers).
        layer: name of the module, which the model calls once; its output is a map (N, D, h, w).

    Raises:
        ValueError: no module has that name; the message lists the nearest.
    """

    def __init__(self, model: nn.Module, layer: str | None = None) -> None:
        self.layer = layer
        self.num_features = model.num_features if layer is None and isinstance(model, FeatureModel) else 0
        self._hook: LayerHook | None = None
        if layer is not None:
            modules = dict(model.named_modules(remove_duplicate=False))
            if layer not in modules or not layer:
                nearest = get_close_matches(layer, modules, n=5) or [name for name, _ in model.named_children()]
                raise ValueError(f"{type(model).__name__} has no module {layer!r}; nearest: {', '.join(nearest)}")
            if not TRACES_REMOVAL:
                self._hook = LayerHook(modules[layer])

    def __call__(self, model: nn.Module, images: Tensor, learns: bool = False) -> Prediction:
        """
        Args:
            learns: whether the model learns from its feature map.

        Raises:
            ValueError: the module was not called exactly once, its output is not a map, or the model learns from it and
                it has no gradient although the logits have one.
        """
        if self.layer is None:
            if not isinstance(model, FeatureModel):
                return Prediction(images.new_empty(0), logits_of(model(images)))
            features, logits = predict(model, images, learns)
            last = has_trailing_channels(features, self.num_features)
            return Prediction(channels_first(features) if last else features, logits)
        if self._hook is not None:
            output, calls = self._hook.during(lambda: model(images))
        else:
            watched = model.get_submodule(self.layer)
            output, (calls,) = recorded(lambda: model(images), [(watched, "forward")], copies=True)
        logits = logits_of(output)
        kept = calls[0].output if calls else None
        if len(calls) != 1 or not isinstance(kept, Tensor) or kept.dim() != 4:
            what = f"shape {tuple(kept.shape)}" if isinstance(kept, Tensor) else type(kept).__name__
            found = f"{len(calls)} outputs" if len(calls) != 1 else what
            raise ValueError(f"{type(model).__name__}.{self.layer} gives {found}, not one map (N, D, h, w)")
        if learns and torch.is_grad_enabled() and logits.requires_grad and not calls[0].learns:
            raise ValueError(no_gradient(f"{type(model).__name__}.{self.layer}"))
        return Prediction(kept, logits)

    @torch.no_grad()
    def measure(self, model: nn.Module, images: Tensor) -> int:
        """Set and return `num_features`, the map's channels, from a pass over a batch in evaluation mode."""
        images = images.to(floating_dtype(model))
        training = [module for module in model.modules() if module.training]
        try:
            self.num_features = self(model.eval(), images).features.shape[1]
        finally:
            for module in training:
                module.training = True
        return self.num_features
