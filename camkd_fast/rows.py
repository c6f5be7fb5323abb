"""How tensors of any layout become rows, and two dealings with the autograd engine. Shared by both losses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
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


# Present since torch 2.4 but not public; without it every backward assumes a retained graph and copies.
_engine_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)


def keeps_graph() -> bool:
    """Inside a backward: will the graph survive it (`retain_graph=True`), so that saved tensors must stay intact?"""
    return True if _engine_keeps_graph is None else bool(_engine_keeps_graph())


def first_order(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Wraps a backward whose gradients may not be differentiated again; entries may be lists of gradients.

    torch's `once_differentiable` refuses only where grad_output has a graph. Our gradients depend on the inputs too, so
    under create_graph=True a gradient penalty would silently miss its term.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Any, ...]:
        if not torch.is_grad_enabled():  # create_graph=False
            return backward(ctx, *grad_outputs)
        with torch.no_grad():
            grads = backward(ctx, *grad_outputs)
        return tuple(_refusing(grad) for grad in grads)

    return wrapper


def _refusing(grad: Any) -> Any:
    """`grad` with a graph that raises when it is differentiated."""
    if isinstance(grad, list):
        return [_refusing(entry) for entry in grad]
    if grad is None:
        return None
    refusal = torch._C._functions.DelayedError("camkd_fast: double backward through the loss is not supported", 1)
    return refusal(grad.detach().requires_grad_())
