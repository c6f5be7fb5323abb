"""Data sets and loaders."""

from .augment import Augmentation
from .batch import BadImageError, Batch, Loader, LoaderConfig
from .files import ImageFiles, ImageSet
from .images import LabelledImages, corrupt_labels, stratified_parts
from .splits import Splits

__all__ = [
    "Augmentation",
    "BadImageError",
    "Batch",
    "ImageFiles",
    "ImageSet",
    "LabelledImages",
    "Loader",
    "LoaderConfig",
    "Splits",
    "corrupt_labels",
    "stratified_parts",
]
