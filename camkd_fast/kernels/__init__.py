"""The Triton backend, for CUDA tensors (CPU tensors under Triton's interpreter).

Contracts: `camkd_fast.backends.contract`; formulas and edge conventions: `camkd_fast.backends.reference`. Nothing here
synchronises with the host or writes an input, and the one atomic only finds the program that ends last, so calls can be
captured in a CUDA graph and are reproducible bit for bit.
"""

from .confidence import confidence_backward, confidence_forward
from .features import feature_backward, feature_forward, feature_loss
from .min_norm import min_norm
from .row_loss import row_loss
from .row_shards import row_results, row_sums
from .scale import scale_rows

__all__ = [
    "confidence_backward",
    "confidence_forward",
    "feature_backward",
    "feature_forward",
    "feature_loss",
    "min_norm",
    "row_loss",
    "row_results",
    "row_sums",
    "scale_rows",
]
