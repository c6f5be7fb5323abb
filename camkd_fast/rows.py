"""How tensors of any layout become rows, and one question to the autograd engine. Shared by both losses."""

from __future__ import annotations

import torch
from torch import Tensor


def row_view(logits: Tensor) -> Tensor:
    """(..., C) as the (N, C) or (B, S, C) matrix with unit column stride that backends take.

    A view wherever two row strides describe the layout: padded rows, slices such as `logits[:, :-1]`, expanded rows.
    Only strided columns (a transposed matrix) and four or more non-collapsible dimensions are copied.
    """
    if logits.dim() > 3:
        logits = logits.flatten(0, -2)
    elif logits.dim() == 1:
        logits = logits.unsqueeze(0)
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def contiguous_labels(target: Tensor) -> Tensor:
    """(...) labels as contiguous (N,): a view when they already are."""
    return target if target.dim() == 1 and target.is_contiguous() else target.reshape(-1).contiguous()


# Present since torch 2.4 but not public; without it every backward assumes a retained graph and copies.
_engine_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)


def keeps_graph() -> bool:
    """Inside a backward: will the graph survive it (`retain_graph=True`), so that saved tensors must stay intact?"""
    return True if _engine_keeps_graph is None else bool(_engine_keeps_graph())
