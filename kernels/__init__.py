"""The Triton backend: the six functions of the backend contract, for CUDA tensors (CPU tensors under the interpreter).

Contracts, formulas and edge conventions are those of the package's `reference` module. Nothing here synchronises with
the host, writes an input or uses an atomic, so every call can be captured in a CUDA graph and repeats bit for bit.
"""

from .confidence import confidence_backward, confidence_forward
from .features import feature_backward, feature_forward
from .row_loss import row_loss
from .scale import scale_rows

__all__ = [
    "confidence_backward",
    "confidence_forward",
    "feature_backward",
    "feature_forward",
    "row_loss",
    "scale_rows",
]
