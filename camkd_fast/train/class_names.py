"""Identity of classes: a model's class names against those of a data set.

Two data sets with equally many classes may number them differently, or have other classes altogether. Models carry the
names of their classes where they can, so that a teacher is never compared with the wrong labels.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..models import imagenet_names
from ..models.protocol import Wrapper, device_of, feature_model

if TYPE_CHECKING:
    from ..data.files import ImageSet  # needs NumPy, without which `Distiller` works

_EXAMPLES = 2  # names of each side in an error
ADVICE = "give a model of the same classes, or say which is which with --class-map FILE"


def class_order(
    owner: str, theirs: Sequence[str] | None, ours: Sequence[str] | None, advice: str = ADVICE
) -> list[int] | None:
    """Position of each of our classes among a model's; None if both have one order or either is unknown.

    The model may have more classes than we. Names are equal if their Unicode normal forms are: some systems store
    accents of file names decomposed. If ours are WordNet ids of ImageNet and the model's are descriptions, timm's table
    relates them.

    Args:
        owner: of the model's names, for the error.
        advice: what to do, for the error.

    Raises:
        ValueError: the model lacks one of our names, has one of them twice, or timm is needed and not installed. The
            message has the numbers of classes and two examples of each side.
    """
    if theirs is None or ours is None or list(theirs) == list(ours):
        return None
    names = [normal(name) for name in ours]
    found = positions(theirs)
    if found.keys().isdisjoint(names) and all(map(imagenet_names.is_wordnet_id, ours)):
        found = positions(_wordnet_ids(owner, theirs, ours, advice))
    if len(set(names)) < len(names) or not all(len(found.get(name, ())) == 1 for name in names):
        raise ValueError(
            f"{owner} knows {len(theirs)} classes, such as {examples(theirs, ours)}, but the images have "
            f"{len(ours)}, such as {examples(ours, theirs)}: {_twice(found, names)}{advice}"
        )
    order = [found[name][0] for name in names]
    return None if order == list(range(len(theirs))) else order


def positions(names: Sequence[str]) -> dict[str, list[int]]:
    """The positions of each name, in its Unicode normal form."""
    found: dict[str, list[int]] = {}
    for position, name in enumerate(names):
        found.setdefault(normal(name), []).append(position)
    return found


def _wordnet_ids(owner: str, theirs: Sequence[str], ours: Sequence[str], advice: str) -> Sequence[str]:
    ids = imagenet_names.wordnet_ids(theirs)
    if ids is None:
        raise ValueError(
            f"{owner} knows its {len(theirs)} classes by description, such as {examples(theirs, ours)}, but those of "
            f"the {len(ours)} classes of the images are WordNet ids, such as {examples(ours, theirs)}: install timm, "
            f"which relates them (pip install 'camkd-fast[teachers]'), or {advice}"
        )
    return ids


def _twice(found: dict[str, list[int]], names: Sequence[str]) -> str:
    """The part of an error that names a class which the model has twice; empty if it has none."""
    double = [name for name in names if len(found.get(name, ())) > 1]
    return f"it has {double[0]!r} {len(found[double[0]])} times; " if double else ""


def normal(name: str) -> str:
    """The name in its Unicode normal form."""
    return unicodedata.normalize("NFC", name)


def examples(names: Sequence[str], others: Sequence[str]) -> str:
    """Two of the names, if possible of those that the others lack."""
    lacking = {normal(name) for name in names} - {normal(name) for name in others}
    chosen = [name for name in names if normal(name) in lacking] or list(names)
    return " and ".join(map(repr, chosen[:_EXAMPLES]))


class Renumbered(Wrapper):
    """A model whose logits follow another order of the classes, or are those of some of its classes.

    It keeps the protocol of `models.protocol`. Probabilities are those among the classes that it has.

    Args:
        order: (C,) position of each class in the model's logits.
    """

    order: Tensor

    def __init__(self, model: nn.Module, order: Sequence[int]) -> None:
        super().__init__()
        self.model = feature_model(model)
        self.num_features, self.num_classes = self.model.num_features, len(order)
        # Part of the state, and so of the hash by which a teacher cache knows its teachers.
        self.register_buffer("order", torch.tensor(order, device=device_of(model)))
        self.train(model.training)

    def after(self, logits: Tensor) -> Tensor:
        return logits.index_select(1, self.order)


def renumbered(model: nn.Module, owner: str, metadata: dict[str, Any], images: ImageSet) -> nn.Module:
    """The model with its logits in the order of the images' classes; the model itself if nothing differs.

    Raises:
        ValueError: as `class_order`.
    """
    order = class_order(owner, metadata.get("class_names"), images.class_names)
    return model if order is None else Renumbered(model, order).eval()
