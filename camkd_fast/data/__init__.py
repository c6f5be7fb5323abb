"""Data sets and loaders."""

from .images import LabelledImages, corrupt_labels, stratified_parts
from .resident import ResidentBatches

__all__ = ["LabelledImages", "ResidentBatches", "corrupt_labels", "stratified_parts"]
