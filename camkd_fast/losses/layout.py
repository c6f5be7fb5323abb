"""Tensors of any layout as the rows that backends take."""

from __future__ import annotations

from torch import Tensor


def row_view(logits: Tensor) -> Tensor:
    """(..., C) as the (N, C) or (B, S, C) matrix with unit column stride that backends take.

    A view wherever two row strides describe the layout: padded rows, slices such as `logits[:, :-1]`, expanded rows.
    Only strided columns (a transposed matrix) and four or more non-collapsible dimensions are copied.
    """
    dimensions = logits.dim()
    if dimensions > 3:
        logits = logits.flatten(0, -2)
    elif dimensions == 1:
        logits = logits.unsqueeze(0)
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def contiguous_labels(target: Tensor) -> Tensor:
    """(...) labels as contiguous (N,): a view when they already are."""
    return target if target.dim() == 1 and target.is_contiguous() else target.reshape(-1).contiguous()
