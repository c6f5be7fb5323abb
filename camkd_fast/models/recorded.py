"""What methods of a model return while the model runs, without a hook or a wrapper that stays on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

# Whether torch.compile follows the removal of a function from a module's `__dict__`. Without that it compiles twice,
# because the first call leaves a method there, and it does not see functions that stand in for a module's forward.
TRACES_REMOVAL = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


class Call(NamedTuple):
    """One call of a recorded method."""

    output: Any
    version: int | None  # of the output, see `version_of`
    learns: bool  # whether gradients were enabled


def recorded(
    run: Callable[[], Any], methods: Sequence[tuple[nn.Module, str]], copies: bool = False
) -> tuple[Any, list[list[Call]]]:
    """The result of `run` and the calls of each method while it ran.

    A function in the module's `__dict__` stands in for the method during the call. torch.compile guards these, so
    compiled models are recorded too, also if they were compiled before; of hooks it does not notice later changes.
    Nothing stays on the modules, which can be scripted, pickled and copied between calls.

    Args:
        methods: modules and names of their methods. The output of "forward" is that of the module's forward hooks.
        copies: keep copies of tensors, which later operations cannot change in place.
    """
    calls: list[list[Call]] = [[] for _ in methods]
    restore: list[Callable[[], None]] = []
    try:
        for (module, name), found in zip(methods, calls, strict=True):
            restore.append(_record(module, name, found, copies))
        result = run()
    finally:
        for undo in reversed(restore):
            undo()
    return result, calls


def version_of(value: object) -> int | None:
    """A number that grows with each change in place; None if there is none, such as under torch.compile."""
    if torch.compiler.is_compiling() or not isinstance(value, torch.Tensor) or value.is_inference():
        return None
    return value._version


def _record(module: nn.Module, name: str, found: list[Call], copies: bool) -> Callable[[], None]:
    """Add each call of the method to `found` until the returned function runs."""

    def keep(output: Any) -> None:
        copied = output.clone() if copies and isinstance(output, torch.Tensor) else output
        found.append(Call(copied, version_of(copied), torch.is_grad_enabled()))

    if name == "forward" and module._forward_hooks:  # which may change the output
        if torch.compiler.is_compiling():
            kind = type(module).__name__
            raise ValueError(f"{kind} has forward hooks, under which torch.compile cannot record its output")
        return module.register_forward_hook(lambda _, inputs, output: keep(output)).remove
    method, own = getattr(module, name), module.__dict__.get(name)

    def record(*args: Any, **options: Any) -> Any:
        output = method(*args, **options)
        keep(output)
        return output

    module.__dict__[name] = record

    def undo() -> None:
        if own is not None and not _is_inherited(module, name, own):
            module.__dict__[name] = own
        elif torch.compiler.is_compiling() and not TRACES_REMOVAL:
            module.__dict__[name] = method  # which calls the same, and the next call that is not compiled removes it
        else:
            del module.__dict__[name]

    return undo


def _is_inherited(module: nn.Module, name: str, own: object) -> bool:
    """Whether a module's own attribute is the method of its class."""
    function = getattr(own, "__func__", None)
    return function is not None and function is getattr(type(module), name, None)
