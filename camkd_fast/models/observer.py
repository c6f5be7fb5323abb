"""Outputs of a student of any class: its logits, and the output of one of its modules as the feature map."""

from __future__ import annotations

import weakref
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .protocol import FeatureModel, Prediction, floating_dtype, logits_of, predict


class _Outputs:
    """Outputs of the observed module. Its hook refers to them, not to the observer, which may go before the model."""

    def __init__(self) -> None:
        self.seen: list[Any] | None = None  # of the call that runs
        self.copies = False  # whether what comes after the module changes its output in place

    def keep(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if self.seen is not None:
            self.seen.append(output.clone() if self.copies and isinstance(output, Tensor) else output)


class Observer:
    """Calls a model and returns logits and feature map.

    The map is that of the model's own protocol (`models.protocol`), or the output of a named module, which a forward
    hook keeps during the call. Without either it is empty. The model itself is not wrapped, so its parameters and its
    state keep their names. The hook is removed with the observer, and not after each call: torch.compile does not check
    for hooks that come later.

    Args:
        model: images (N, channels, H, W) -> logits (N, C), or an object whose `logits` they are (transformers).
        layer: name of the module, which the model calls once; its output is a map (N, D, h, w).

    Raises:
        ValueError: no module has that name; the message lists the nearest.
    """

    def __init__(self, model: nn.Module, layer: str | None = None) -> None:
        self.layer = layer
        self.num_features = model.num_features if layer is None and isinstance(model, FeatureModel) else 0
        self._outputs = _Outputs()
        self._handle: RemovableHandle | None = None
        if layer is not None:
            modules = dict(model.named_modules(remove_duplicate=False))
            if layer not in modules or not layer:
                nearest = get_close_matches(layer, modules, n=5) or [name for name, _ in model.named_children()]
                raise ValueError(f"{type(model).__name__} has no module {layer!r}; nearest: {', '.join(nearest)}")
            self._handle = modules[layer].register_forward_hook(self._outputs.keep)
            self._remove_hook_at_the_end()

    def _remove_hook_at_the_end(self) -> None:
        if self._handle is not None:
            weakref.finalize(self, self._handle.remove).atexit = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy has the hook of the model that was copied with it."""
        self.__dict__.update(state)
        self._remove_hook_at_the_end()

    def __call__(self, model: nn.Module, images: Tensor) -> Prediction:
        """
        Raises:
            ValueError: the module was not called exactly once, or its output is not a map.
        """
        if self.layer is None:
            if isinstance(model, FeatureModel):
                return predict(model, images)
            return Prediction(images.new_empty(0), logits_of(model(images)))
        seen: list[Any] = []
        self._outputs.seen = seen
        try:
            logits = logits_of(model(images))
        finally:
            self._outputs.seen = None
        (features, *more) = seen or [None]
        if more or not isinstance(features, Tensor) or features.dim() != 4:
            what = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
            found = f"{len(seen)} outputs" if len(seen) != 1 else what
            raise ValueError(f"{type(model).__name__}.{self.layer} gives {found}, not one map (N, D, h, w)")
        return Prediction(features, logits)

    @torch.no_grad()
    def measure(self, model: nn.Module, images: Tensor) -> int:
        """Set and return `num_features`, the map's channels, from passes over a batch in evaluation mode."""
        images = images.to(floating_dtype(model))
        training = [module for module in model.modules() if module.training]
        try:
            changed = self(model.eval(), images).features
            self._outputs.copies = True
            self._outputs.copies = not torch.equal(changed, self(model, images).features)
            self.num_features = changed.shape[1]
        finally:
            for module in training:
                module.training = True
        return self.num_features
