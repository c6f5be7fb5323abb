"""Teachers given to a `Distiller`: modules, sources or strings, frozen, behind the student's images and classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...models import freeze, sources
from ...models.preprocessing import Preprocessing, adapted
from ...models.protocol import FeatureModel, Prediction, Source, head_makes
from ...models.split import LogitsOnly, split
from ..class_names import Renumbered, class_order
from .live import Teachers


class Images(NamedTuple):
    """What is known of the student's images; None: unknown."""

    example: Tensor | None = None  # (n, channels, H, W), by which models are split at a layer
    preprocessing: Preprocessing | None = None
    class_names: Sequence[str] | None = None  # in the order of the student's logits


def frozen_teachers(
    teachers: Sequence[nn.Module | Source | str],
    layers: Sequence[str | None] | None,
    images: Images,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
) -> list[nn.Module]:
    """Copies of the teachers that follow the protocol, as functions of the student's images.

    Args:
        layers: name of each teacher's module whose output is its feature map; None: the teacher's own.
        dtype: of the copies; None: their own.

    Raises:
        ValueError: as `Distiller`.
    """
    layers = [None] * len(teachers) if layers is None else layers
    if len(layers) != len(teachers):
        raise ValueError(f"teacher_layers holds {len(layers)}, but there are {len(teachers)} teachers")
    frozen = []
    for teacher, layer in zip(teachers, layers, strict=True):
        module = teacher if isinstance(teacher, nn.Module) else getattr(teacher, "model", None)
        training = [] if module is None else [part for part in module.modules() if part.training]
        try:
            source = _source(teacher, layer, images.example)
            name = f"teacher {teacher if isinstance(teacher, str) else type(source.model).__name__}"
            frozen.append(_fitted(name, replace(source, model=freeze(source.model, dtype, channels_last)), images))
        finally:
            for part in training:  # a split sets its model to evaluation mode
                part.training = True
    return frozen


def _source(given: nn.Module | Source | str, layer: str | None, example: Tensor | None) -> Source:
    """What is known of a teacher, with a model that follows the protocol."""
    source = sources.load(given) if isinstance(given, str) else given if isinstance(given, Source) else Source(given)
    model = source.model
    if layer is not None:
        model = split(model.eval(), layer, needed(example, "teacher_layers", layer))
    elif not isinstance(model, FeatureModel):
        model = LogitsOnly(model, f"teacher_layers names no module of {type(model).__name__}")
    return replace(source, model=model)


def _fitted(name: str, source: Source, images: Images) -> nn.Module:
    """The model as a function of the student's images, with logits of the student's classes."""
    model = source.model
    order = class_order(name, source.classes, images.class_names)
    if order is not None:
        model = Renumbered(model, order)
    if images.preprocessing is None:
        return model
    return adapted(model, Preprocessing(source.mean, source.std, source.size), images.preprocessing)


def needed(example: Tensor | None, name: str, layer: str) -> Tensor:
    """The example.

    Raises:
        ValueError: there is none; the message has the option that needs it.
    """
    if example is None:
        raise ValueError(f"{name} {layer!r} needs example images, of which the module's output is taken")
    return example


def check_heads(teachers: Teachers, outputs: Sequence[Prediction]) -> None:
    """
    Raises:
        ValueError: the head of a teacher makes other logits of its feature map than the teacher gave.
    """
    for k, (head, output) in enumerate(zip(teachers.heads, outputs, strict=True)):
        if output.features.dim() == 4 and not head_makes(output.logits, head, output.features):
            raise ValueError(
                f"the logits of teacher {k} are not forward_head of its feature map, so its head cannot be applied to "
                "the student's: a hook or its forward changes the map or the logits between or after the two; "
                "strategies that read logits or maps only can use it"
            )
