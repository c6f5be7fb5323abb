"""Data sets and loaders."""

from .augment import Augmentation
from .batch import BadImageError, Batch, Loader, LoaderConfig
from .files import ImageFiles, ImageSet
from .images import LabelledImages, corrupt_labels, stratified_parts
from .resident import ResidentBatches
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
    "ResidentBatches",
    "Splits",
    "corrupt_labels",
    "stratified_parts",
]
