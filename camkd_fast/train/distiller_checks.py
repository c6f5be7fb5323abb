"""Checks of the arguments of `Distiller`, before any work where possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..losses.formula import check_flag, check_number
from ..models.preprocessing import Preprocessing
from ..models.protocol import inner_model, unwrapped
from ..models.split import LogitsOnly
from . import strategies
from .strategies import Strategy


def check_types(
    label_smoothing: object, preprocessing: object, class_names: object, teacher_dtype: object, channels_last: object
) -> None:
    """
    Raises:
        TypeError: an argument has another type than it should.
        ValueError: label_smoothing lies outside [0, 1].
    """
    check_number("label_smoothing", label_smoothing, positive=False)
    if not 0.0 <= label_smoothing <= 1.0:  # type: ignore[operator]
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
    check_flag("channels_last", channels_last)
    if teacher_dtype is not None and not (isinstance(teacher_dtype, torch.dtype) and teacher_dtype.is_floating_point):
        raise TypeError(f"teacher_dtype must be a floating-point torch.dtype or None, got {teacher_dtype!r}")
    if preprocessing is not None and not isinstance(preprocessing, Preprocessing):
        raise TypeError(
            f"preprocessing must be a camkd_fast.models.preprocessing.Preprocessing or None, got {preprocessing!r}"
        )
    if class_names is not None and (isinstance(class_names, str) or not isinstance(class_names, Sequence)):
        raise TypeError(f"class_names must be a sequence of names or None, got {class_names!r}")


def check_layers(student_layer: object, teacher_layers: object, example: object) -> None:
    """
    Raises:
        TypeError: a layer is no name, or the example no tensor.
    """
    if student_layer is not None and not isinstance(student_layer, str):
        raise TypeError(f"student_layer must be a module's name or None, got {student_layer!r}")
    if teacher_layers is not None:
        if isinstance(teacher_layers, str) or not isinstance(teacher_layers, Sequence):
            raise TypeError(f"teacher_layers must be a sequence of names or None, got {teacher_layers!r}")
        for k, layer in enumerate(teacher_layers):
            if layer is not None and not isinstance(layer, str):
                raise TypeError(f"teacher_layers[{k}] must be a module's name or None, got {layer!r}")
    if example is not None and not isinstance(example, torch.Tensor):
        raise TypeError(f"example must be a tensor of images, got {type(example).__name__}")


def strategy_class(strategy: object, options: Mapping[str, Any]) -> type[Strategy]:
    """The class of a strategy that is given by name or as an instance.

    Raises:
        TypeError: it is neither, or options are given with an instance.
        ValueError, TypeError: as `strategies.check`.
    """
    if isinstance(strategy, str):
        return strategies.check(strategy, options)
    if not isinstance(strategy, Strategy):
        raise TypeError(f"strategy must be a name or a Strategy, got {strategy!r}")
    if options:
        raise TypeError(
            f"strategy is a {type(strategy).__name__} with options of its own, but {', '.join(options)} "
            f"{'is' if len(options) == 1 else 'are'} given: give the name {strategy.name!r}, or no options"
        )
    return type(strategy)


def check_teachers(strategy: type[Strategy], teachers: Sequence[tuple[str, nn.Module]], classes: int | None) -> None:
    """Check frozen teachers, each with its name.

    Raises:
        ValueError: a teacher lacks the feature map that the strategy needs, or has other classes than the student.
    """
    for name, model in teachers:
        if not getattr(model, "num_features", 1):
            strategies.refuse_logits_only(name, _reason(model), strategy)
        count = getattr(model, "num_classes", classes)
        if classes is not None and count != classes:
            raise ValueError(f"{name} has {count} classes, but the student has {classes}")


def check_replicas(student: nn.Module, strategy: Strategy) -> None:
    """Check that gradients of the strategy's parameters are averaged over processes if those of the student are.

    Raises:
        ValueError: only the student is replicated.
    """
    replicated = any(isinstance(module, nn.parallel.DistributedDataParallel) for module in student.modules())
    if replicated and any(parameter.requires_grad for parameter in strategy.parameters()):
        raise ValueError(
            f"{strategy.name} trains parameters of its own, but only the student is a DistributedDataParallel: make "
            "the Distiller of the bare student, and wrap the Distiller"
        )


def _reason(model: nn.Module) -> str:
    """Why a model has no feature map."""
    reasons = (part.reason for part in unwrapped(model) if isinstance(part, LogitsOnly))
    return next(reasons, f"num_features of {type(inner_model(model)).__name__} is 0")
