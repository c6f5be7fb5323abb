"""Training, validation and test part of a data set."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from .files import ImageFiles, ImageSet
from .images import LabelledImages, stratified_parts

AnySet = TypeVar("AnySet", LabelledImages, ImageFiles)


class Splits(NamedTuple):
    """Disjoint parts with the same classes and normalisation.

    The validation part is for choosing settings, the test part for the final number.
    """

    train: ImageSet
    validation: ImageSet
    test: ImageSet


def hold_out(images: AnySet, fraction: float, seed: int) -> tuple[AnySet, AnySet]:
    """The set without a part of it, and that part: every class in proportion, both in the set's order.

    The part has round(fraction * N) images, but one at least unless the fraction is 0.

    Raises:
        ValueError: the fraction lies outside [0, 1) or leaves nothing of the set.
    """
    if not 0.0 <= fraction < 1.0:
        raise ValueError(f"the fraction to hold out must lie in [0, 1), got {fraction}")
    held = max(1, round(fraction * len(images))) if fraction else 0
    if held >= len(images):
        raise ValueError(f"holding out {held} of {len(images)} images leaves none")
    kept, out = stratified_parts(images.labels, (len(images) - held, held), seed)
    return images.take(kept.sort().values), images.take(out.sort().values)
