"""Backends: who computes the numbers of the losses. `dispatch` picks one; `reference` is the specification."""

from .dispatch import explain

__all__ = ["explain"]
