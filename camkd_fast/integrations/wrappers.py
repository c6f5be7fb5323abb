"""Wrappers of models: what lies inside DDP and torch.compile, and work inside a wrapped model's forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def unwrapped(model: Any) -> Any:
    """The model inside DDP and torch.compile. FSDP2 changes a model's class and wraps nothing."""
    while (inner := _inside(model)) is not None:
        model = inner
    return model


def _inside(model: Any) -> nn.Module | None:
    children = model._modules
    if "_orig_mod" in children:
        return children["_orig_mod"]  # type: ignore[no-any-return]
    return None if hasattr(model, "get_output_embeddings") else children.get("module")


def before_compilation(module: nn.Module) -> nn.Module:
    """The module inside torch.compile."""
    while "_orig_mod" in module._modules:
        module = module._modules["_orig_mod"]  # type: ignore[assignment]
    return module


def call_inside(wrapper: nn.Module, inner: nn.Module, function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments) as the forward of `inner`, called through `wrapper`, so that the hooks of both run."""
    # Compiled code would not see the other forward
    wrapper, inner = before_compilation(wrapper), before_compilation(inner)
    # accelerate's hooks, which load and move weights, are in the instance's forward, around this one
    name = "_old_forward" if "_hf_hook" in vars(inner) else "forward"
    own = vars(inner).get(name)  # accelerate and TRL set one at the instance

    def restore() -> None:
        vars(inner).pop(name, None)
        if own is not None:
            vars(inner)[name] = own

    def forward(*given: Any) -> Any:
        restore()
        return function(*given)

    vars(inner)[name] = forward
    try:
        return wrapper(*arguments)
    finally:
        restore()
