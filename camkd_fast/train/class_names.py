"""Identity of classes: a model's class names against those of a data set.

Two data sets with equally many classes may number them differently, or have other classes altogether. A model's file
stores the names, so that a teacher is never compared with the wrong labels.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data.files import ImageSet
from ..models.protocol import FeatureModel, feature_model

_EXAMPLES = 2  # names of each side in an error


def class_order(owner: str, theirs: Sequence[str] | None, ours: Sequence[str] | None) -> list[int] | None:
    """Position of each of our classes among a model's; None if both have one order or either is unknown.

    Names are equal if their Unicode normal forms are: some systems store accents of file names decomposed.

    Args:
        owner: of the model's names, for the error.

    Raises:
        ValueError: the sets of names differ. The message has their numbers and two examples of each.
    """
    if theirs is None or ours is None or list(theirs) == list(ours):
        return None
    place = {_normal(name): position for position, name in enumerate(theirs)}
    names = [_normal(name) for name in ours]
    if len(place) != len(theirs) or place.keys() != set(names) or len(names) != len(theirs):
        raise ValueError(
            f"{owner} knows {len(theirs)} classes, such as {examples(theirs, ours)}, but the images have "
            f"{len(ours)}, such as {examples(ours, theirs)}: use a model that was trained on the same classes"
        )
    order = [place[name] for name in names]
    return None if order == list(range(len(order))) else order


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def examples(names: Sequence[str], others: Sequence[str]) -> str:
    """Two of the names, if possible of those that the others lack."""
    lacking = {_normal(name) for name in names} - {_normal(name) for name in others}
    chosen = [name for name in names if _normal(name) in lacking] or list(names)
    return " and ".join(map(repr, chosen[:_EXAMPLES]))


class Renumbered(nn.Module):
    """A model whose logits follow another order of the classes. It keeps the protocol of `models.protocol`.

    Args:
        order: (C,) position of each class in the model's logits.
    """

    order: Tensor

    def __init__(self, model: nn.Module, order: Sequence[int]) -> None:
        super().__init__()
        self.model: FeatureModel = feature_model(model)
        self.num_features, self.num_classes = self.model.num_features, len(order)
        # Part of the state, and so of the hash by which a teacher cache knows its teachers.
        self.register_buffer("order", torch.tensor(order))

    def forward_features(self, x: Tensor) -> Tensor:
        return self.model.forward_features(x)

    def forward_head(self, features: Tensor) -> Tensor:
        return self.model.forward_head(features).index_select(1, self.order)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def renumbered(model: nn.Module, owner: str, metadata: dict[str, Any], images: ImageSet) -> nn.Module:
    """The model with its logits in the order of the images' classes; the model itself if nothing differs.

    Raises:
        ValueError: as `class_order`.
    """
    order = class_order(owner, metadata.get("class_names"), images.class_names)
    return model if order is None else Renumbered(model, order).to(next(model.parameters()).device).eval()
