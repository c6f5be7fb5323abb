"""Data sets and loaders."""

from .files import ImageFiles, ImageSet
from .images import LabelledImages, corrupt_labels, stratified_parts
from .resident import ResidentBatches
from .splits import Splits

__all__ = [
    "ImageFiles",
    "ImageSet",
    "LabelledImages",
    "ResidentBatches",
    "Splits",
    "corrupt_labels",
    "stratified_parts",
]
