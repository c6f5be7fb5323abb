"""What the losses need to know of the autograd engine."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.memory import is_ordinary


def needs_grad(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def savable(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy of one made under torch.inference_mode, which autograd refuses to save.

    torch.compile cannot ask for the mode; there autograd's own error remains, which says to use torch.no_grad.
    """
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not tensor.is_inference():
        return tensor
    return tensor.clone()


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """`ctx.save_for_backward` that takes tensors made under torch.inference_mode as well; see `saved`."""
    ctx.inference = {i: tensor for i, tensor in enumerate(tensors) if tensor is not None and tensor.is_inference()}
    ctx.save_for_backward(*(None if i in ctx.inference else tensor for i, tensor in enumerate(tensors)))


def saved(ctx: Any) -> list[Any]:
    """The tensors of `save`."""
    return [ctx.inference.get(i, tensor) for i, tensor in enumerate(ctx.saved_tensors)]


# Exists since torch 2.4 but is not public; without it every backward assumes a retained graph and copies.
_engine_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)


def keeps_graph() -> bool:
    """Inside a backward: whether the graph is retained (`retain_graph=True`), so saved tensors must not be changed."""
    return True if _engine_keeps_graph is None else bool(_engine_keeps_graph())


def is_one(grad_output: Tensor, in_backward: float | Tensor = 1.0) -> bool:
    """Whether backward multiplies by 1, as in `loss.backward()`.

    False on a GPU, where reading would synchronise, and in a trace, which would keep the number.
    """
    on_host = grad_output.is_cpu and isinstance(in_backward, float) and grad_output.dim() == 0
    return on_host and is_ordinary([grad_output]) and bool(grad_output.item() * in_backward == 1.0)


def first_order(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Wraps a backward function so that it raises if its gradients are to have a graph.

    torch's `once_differentiable` raises where they are differentiated, and only if grad_output has a graph. Our
    gradients depend on the inputs too, whose graph it does not know: a gradient penalty would lose its term in silence.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("camkd_fast: double backward through the loss is not supported, got create_graph=True")
        return backward(ctx, *grad_outputs)

    return wrapper
