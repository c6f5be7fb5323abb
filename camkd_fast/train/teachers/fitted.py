"""A teacher behind the student's images and labels: its preprocessing, and its classes in their order."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ...data.files import ImageSet
from ...errors import first_line
from ...models.preprocessing import Preprocessing, adapted
from ...models.protocol import Source, device_of, feature_model, floating_dtype, predict
from ..class_map import Classes, ClassMap
from ..class_names import ADVICE, Renumbered, class_order


class Fitted(NamedTuple):
    """A teacher as the student's batch and labels need it."""

    model: nn.Module
    classes: int  # of the model itself
    reordered: bool  # whether the model itself has them in another order, or more of them
    compared: bool  # whether its classes are known to be the images', by name or by a class map


def fitted(name: str, model: nn.Module, source: Source, images: ImageSet, class_map: ClassMap | None = None) -> Fitted:
    """The model of a source for images as a loader yields them, and for their labels.

    Runs one image, by which the model's size, channels and number of classes are known before training.

    Args:
        name: of the source.
        model: of the source, frozen, on any device.

    Raises:
        ValueError: the model cannot take the images, or classes differ and no class map relates them; the message has
            the source's name and both sides.
    """
    given = preprocessing(images)
    own = Preprocessing(source.mean, source.std, source.size)
    try:
        count = _classes(adapted(model, own, given), images)
    except Exception as error:  # the user's and other libraries' code
        raise ValueError(
            f"teacher {name} cannot take the student's images of shape {images.shape}: {first_line(error)}"
        ) from error
    order, compared = _order(name, count, source, images, class_map)
    if order is not None:
        model = Renumbered(model, order).eval()
    return Fitted(adapted(model, own, given), count, order is not None, compared)


def preprocessing(images: ImageSet) -> Preprocessing:
    """The preprocessing of images as a loader yields them; the mean and std of a set are levels of 0 to 255."""
    mean, std = (tuple(level / 255 for level in levels) for levels in (images.mean, images.std))
    _, height, width = images.shape
    return Preprocessing(mean, std, (height, width), images.channels)


@torch.no_grad()
def _classes(model: nn.Module, images: ImageSet) -> int:
    """Number of logits of one image.

    Raises:
        ValueError: the logits are no (N, C) tensor.
        Any error of the model.
    """
    one = torch.zeros(1, *images.shape, dtype=floating_dtype(model), device=device_of(model))
    logits = predict(feature_model(model), one).logits
    if logits.dim() != 2:
        raise ValueError(f"its logits have shape {tuple(logits.shape)}, not (N, C)")
    return logits.shape[1]


def _order(
    name: str, count: int, source: Source, images: ImageSet, class_map: ClassMap | None
) -> tuple[list[int] | None, bool]:
    """Position of each class of the images among the model's `count`, None if equal; whether they were compared."""
    owner = f"teacher {name}"
    if source.classes is not None and len(source.classes) != count:
        raise ValueError(f"{owner} has {count} classes, but names for {len(source.classes)}")
    if class_map is not None:
        theirs = Classes(owner, count, source.classes)
        order = class_map.order(name, theirs, Classes("the images", images.num_classes, images.class_names))
        if order is not None:
            return (None if order == list(range(count)) else order), True
    if source.classes is not None and images.class_names is not None:
        return class_order(owner, source.classes, images.class_names), True
    if count != images.num_classes:
        side = "its" if source.classes is None else "the images'"
        raise ValueError(
            f"{owner} has {count} classes, but the student's images have {images.num_classes}, and {side} names are "
            f"unknown: {ADVICE}"
        )
    return None, False
