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
    """The set without a part of it, and that part: round(fraction * N) images, every class in proportion.

    Both keep the set's order. A fraction of 0 gives an empty second part.

    Raises:
        ValueError: the fraction lies outside [0, 1), or leaves one of the parts empty although it is not 0.
    """
    if not 0.0 <= fraction < 1.0:
        raise ValueError(f"the fraction to hold out must lie in [0, 1), got {fraction}")
    held = round(fraction * len(images))
    if fraction and not 0 < held < len(images):
        raise ValueError(f"a fraction of {fraction} of {len(images)} images leaves {held} held out of them")
    kept, out = stratified_parts(images.labels, (len(images) - held, held), seed)
    return images.take(kept.sort().values), images.take(out.sort().values)
