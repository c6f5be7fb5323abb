"""Teachers given to a `Distiller`: modules, sources or strings, frozen, behind the student's images and classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...losses.entry import KERNEL, way_of_call
from ...models import freeze, sources
from ...models.preprocessing import Preprocessing, adapted
from ...models.protocol import FeatureModel, Prediction, Source, TrailingChannels, head_makes, inner_model
from ...models.split import LogitsOnly, split
from ..class_names import Renumbered, class_order
from .live import Teachers

ADVICE = "expected a model of the same classes, or a Source whose `classes` are the names of class_names"


class Images(NamedTuple):
    """What is known of the student's images; None: unknown."""

    example: Tensor | None = None  # (n, channels, H, W), by which models are split at a layer
    preprocessing: Preprocessing | None = None
    class_names: Sequence[str] | None = None  # in the order of the student's logits


Given = nn.Module | Source | str


def listed(teachers: Teachers | Iterable[Given] | None) -> Teachers | list[Given] | None:
    """Teachers as a list, unless the caller has `Teachers` of its own.

    Raises:
        TypeError: they are no list, or an entry is no teacher; the message has its position.
    """
    single = isinstance(teachers, str) or (isinstance(teachers, nn.Module) and not isinstance(teachers, nn.ModuleList))
    if single or isinstance(teachers, Mapping):
        advice = "[teacher] for a single one" if single else "list(teachers.values()) for those of a dict"
        raise TypeError(f"teachers must be a list, got {type(teachers).__name__}: {advice}")
    if teachers is None or not isinstance(teachers, Iterable):
        if teachers is not None and not hasattr(teachers, "outputs"):
            raise TypeError(f"teachers must be a list, got {teachers!r}")
        return teachers
    entries = list(teachers)
    for k, entry in enumerate(entries):
        if not isinstance(entry, (nn.Module, Source, str)):
            raise TypeError(f"teachers[{k}] must be a module, a Source or a string, got {type(entry).__name__}")
    return entries


def frozen_teachers(
    teachers: Sequence[Given],
    layers: Sequence[str | None] | None,
    images: Images,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
) -> list[tuple[str, nn.Module]]:
    """Names and copies of the teachers that follow the protocol, as functions of the student's images.

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
    for k, (teacher, layer) in enumerate(zip(teachers, layers, strict=True)):
        module = teacher if isinstance(teacher, nn.Module) else getattr(teacher, "model", None)
        training = [] if module is None else [part for part in module.modules() if part.training]
        try:
            source = _source(teacher, layer, images.example)
            name = f"teacher {k} ({teacher if isinstance(teacher, str) else type(inner_model(source.model)).__name__})"
            frozen.append((name, _fitted(name, _frozen(source, dtype, channels_last), images)))
        finally:
            for part in training:  # a split sets its model to evaluation mode
                part.training = True
    return frozen


def _source(given: Given, layer: str | None, example: Tensor | None) -> Source:
    """What is known of a teacher, with a model that follows the protocol."""
    source = sources.load(given) if isinstance(given, str) else given if isinstance(given, Source) else Source(given)
    model: nn.Module = getattr(source.model, "_orig_mod", source.model)  # of a compiled one, which could not be changed
    if layer is not None:
        model = model.model if isinstance(model, LogitsOnly) else model
        model = split(model.eval(), layer, needed(example, "teacher_layers", layer))
    elif not isinstance(model, FeatureModel):
        model = LogitsOnly(model, f"teacher_layers names no module of {type(model).__name__}")
    return replace(source, model=model)


def _frozen(source: Source, dtype: torch.dtype | None, channels_last: bool) -> Source:
    """The source with a frozen copy of its model, whose map is (N, D, h, w) if timm says that it is not."""
    model = freeze(source.model, dtype, channels_last)
    if str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC"):
        model = TrailingChannels(model)
    return replace(source, model=model)


def _fitted(name: str, source: Source, images: Images) -> nn.Module:
    """The model as a function of the student's images, with logits of the student's classes."""
    model = source.model
    order = class_order(name, source.classes, images.class_names, ADVICE)
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


def can_compare(outputs: Sequence[Prediction]) -> bool:
    """Whether the host may read these numbers: in an ordinary call, and not while a CUDA graph is captured."""
    if way_of_call() is not KERNEL or any(type(output.logits) is not Tensor for output in outputs):
        return False
    return not (any(output.logits.is_cuda for output in outputs) and torch.cuda.is_current_stream_capturing())


def check_heads(teachers: Teachers, outputs: Sequence[Prediction]) -> None:
    """
    Raises:
        ValueError: the head of a teacher makes other logits of its feature map than the teacher gave.
    """
    for k, (head, output) in enumerate(zip(teachers.heads, outputs, strict=True)):
        is_map = isinstance(output.features, Tensor) and output.features.dim() == 4
        if is_map and not head_makes(output.logits, head, output.features):
            raise ValueError(
                f"the logits of teacher {k} are not forward_head of its feature map, so its head cannot be applied to "
                "the student's: a hook or its forward changes the map or the logits between or after the two; "
                "strategies that read logits or maps only can use it"
            )
