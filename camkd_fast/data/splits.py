"""Training, validation and test splits of a data set."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from .files import ImageFiles, ImageSet
from .images import LabelledImages, stratified_parts

AnySet = TypeVar("AnySet", LabelledImages, ImageFiles)


class Splits(NamedTuple):
    """Disjoint splits with the same classes and normalisation.

    The validation split is for choosing settings, the test split for the final result.
    """

    train: ImageSet
    validation: ImageSet
    test: ImageSet


def hold_out(images: AnySet, fraction: float, seed: int) -> tuple[AnySet, AnySet]:
    """Split a set into the remaining and the held-out images, stratified by class, both in the set's order.

    round(fraction * N) images are held out, but at least one unless the fraction is 0.

    Raises:
        ValueError: the fraction is outside [0, 1) or leaves no image.
    """
    if not 0.0 <= fraction < 1.0:
        raise ValueError(f"the fraction to hold out must lie in [0, 1), got {fraction}")
    held = max(1, round(fraction * len(images))) if fraction else 0
    if held >= len(images):
        raise ValueError(f"holding out {held} of {len(images)} images leaves none")
    kept, out = stratified_parts(images.labels, (len(images) - held, held), seed)
    return images.take(kept.sort().values), images.take(out.sort().values)
