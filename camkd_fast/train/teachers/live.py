"""Frozen teachers and what a strategy may ask of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from ...models.protocol import FeatureModel, Prediction, feature_model, predict

if TYPE_CHECKING:
    from ...data.batch import Batch

Head = Callable[[Tensor], Tensor]  # (N, D_k, H, W) -> logits (N, C)


class Teachers(Protocol):
    """K teachers, whether they compute (`LiveTeachers`) or replay what they once said (`cache.CachedTeachers`)."""

    @property
    def num_features(self) -> list[int]:
        """Channels D_k of each feature map; 0 where no feature maps are to be had."""

    @property
    def heads(self) -> list[Head]:
        """Pooling and classifier of each, differentiable in their input, whatever autocast is on around them."""

    @property
    def hashes(self) -> list[str]:
        """What identifies each teacher: a change of any weight or layer changes it."""

    def __call__(self, batch: Batch) -> list[Prediction]:
        """Features (n, D_k, H_k, W_k) and logits (n, C) of each teacher for one batch, without autograd."""


class LiveTeachers:
    """K trained models in evaluation mode, whose parameters no gradient reaches.

    Args:
        models: K of them, 1 to 16, as `models.freeze` leaves them or as they were trained; they are changed to
            evaluation mode in place.
        num_classes: of the data set and hence of the student.
        autocast: bfloat16 or float16 to run the forward passes under autocast; None runs them in the parameters' own
            dtype, also where the caller has autocast on.

    Raises:
        ValueError: no teacher or more than 16, or one with another class count.
        TypeError: one does not follow the protocol of `camkd_fast.models.protocol`.
    """

    MAX = 16  # what the loss takes

    def __init__(self, models: Sequence[nn.Module], num_classes: int, autocast: torch.dtype | None = None) -> None:
        if not 1 <= len(models) <= self.MAX:
            raise ValueError(f"a student learns from 1 to {self.MAX} teachers, got {len(models)}")
        for k, model in enumerate(models):
            classes = getattr(model, "num_classes", num_classes)
            if classes != num_classes:
                name = f"teacher {k} ({type(model).__name__})"
                raise ValueError(f"{name} knows {classes} classes, but the data set has {num_classes}")
        self._modules = [model.eval().requires_grad_(False) for model in models]
        self._models = [feature_model(model) for model in self._modules]
        self._dtypes = [_dtype(model) for model in self._modules]
        self.num_classes, self.autocast = num_classes, autocast
        self._compiled_size = -1
        self._compiled = self._predict

    def compile_for(self, batch_size: int) -> None:
        """Run batches of that size compiled, all teachers as one graph; another size would cost a compilation each."""
        self._compiled_size = batch_size
        self._compiled = torch.compile(self._predict, fullgraph=True, dynamic=False)

    @property
    def num_features(self) -> list[int]:
        return [model.num_features for model in self._models]

    @property
    def heads(self) -> list[Head]:
        return [partial(_head, model, dtype) for model, dtype in zip(self._models, self._dtypes, strict=True)]

    @property
    def hashes(self) -> list[str]:
        """sha256 of each: its layers as it prints them, then every name, dtype, shape and byte of its state."""
        return [state_hash(module) for module in self._modules]

    @torch.no_grad()
    def __call__(self, batch: Batch) -> list[Prediction]:
        run = self._compiled if len(batch.images) == self._compiled_size else self._predict
        return run(batch.images)

    def _predict(self, images: Tensor) -> list[Prediction]:
        with torch.autocast(images.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            return [predict(m, images.to(dtype)) for m, dtype in zip(self._models, self._dtypes, strict=True)]


def _dtype(module: nn.Module) -> torch.dtype:
    """Of the module's first floating point parameter or buffer."""
    tensors = (t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point())
    return next((t.dtype for t in tensors), torch.float32)


def _head(model: FeatureModel, dtype: torch.dtype, features: Tensor) -> Tensor:
    """In the head's own dtype: maps that a student regresses come in float32 whatever the teacher was frozen to."""
    with torch.autocast(features.device.type, enabled=False):
        return model.forward_head(features.to(dtype))


def state_hash(module: nn.Module) -> str:
    """sha256 (hex) of what determines a module's outputs: its printed layers and its state, names included."""
    digest = hashlib.sha256(repr(module).encode())
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(data.numpy())
    return digest.hexdigest()
