"""The output of a module by a forward hook that stays on it: for releases of PyTorch that compile no recording."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .recorded import Call, version_of


class _Calls:
    """Calls of the module. Its hook refers to them, not to the owner, which may go before the model."""

    def __init__(self) -> None:
        self.found: list[Call] | None = None  # of the call of the model that runs

    def keep(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if self.found is not None:
            kept = output.clone() if isinstance(output, Tensor) else output
            self.found.append(Call(kept, version_of(kept), torch.is_grad_enabled()))


class LayerHook:
    """Copies of a module's outputs. The hook is removed with this object, and not after each call: torch.compile does
    not check for hooks that come later."""

    def __init__(self, module: nn.Module) -> None:
        self._calls = _Calls()
        self._handle: RemovableHandle = module.register_forward_hook(self._calls.keep)
        self._remove_at_the_end()

    def _remove_at_the_end(self) -> None:
        weakref.finalize(self, self._handle.remove).atexit = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy has the hook of the model that was copied with it."""
        self.__dict__.update(state)
        self._remove_at_the_end()

    def during(self, run: Callable[[], Any]) -> tuple[Any, list[Call]]:
        """The result of `run` and the module's calls while it ran, as `recorded`."""
        found: list[Call] = []
        self._calls.found = found
        try:
            return run(), found
        finally:
            self._calls.found = None
