"""Tensors of any layout as the rows that backends take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.contract import SecondLabels, second_pair


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


def second_labels(second_target: Any, mix: Any) -> SecondLabels | None:
    """The public arguments together, unchecked; None for rows of one label."""
    return None if second_target is None and mix is None else SecondLabels(second_target, mix)


def second_arguments(second: SecondLabels | None) -> dict[str, Tensor | None]:
    """The same by name."""
    return dict(zip(("second_target", "mix"), second_pair(second), strict=True))


def second_rows(second: SecondLabels | None, dtype: torch.dtype) -> SecondLabels | None:
    """(...) second labels as backends take them: contiguous (N,), the shares in the accumulation dtype."""
    if second is None:
        return None
    return SecondLabels(contiguous_labels(second.target), contiguous_labels(second.mix).to(dtype))


def weight_rows(weighting: Tensor, K: int, N: int, dtype: torch.dtype) -> Tensor:
    """(K,) or (K, ...) weights as (K, N). The expansion is part of the graph, so it sums their gradient, in `dtype`."""
    flat = weighting.reshape(K, -1) if weighting.dim() > 1 else weighting.unsqueeze(-1)
    return flat.to(dtype).expand(K, N)
