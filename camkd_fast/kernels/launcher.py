"""Launches: Triton compiles and launches the first of each kind; later ones launch the kept kernel directly.

Triton's own launch binds, classifies and hashes every argument, reads its settings and asks the driver about every
pointer, each time. What has to be decided again for each call is what Triton specialises a kernel for: the dtype of a
pointer, whether its address is a multiple of 16, and the width of integers (also whether they are 1 or a multiple of
16, unless the kernel says `do_not_specialize`). That is the key of a kept kernel, so it never meets arguments that it
was not compiled for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
from torch import Tensor
from triton import JITFunction
from triton.compiler import CompiledKernel

from .layout import on_device_of

# A tensor, a tuple of tensors, None, or a number in the place of a pointer.
Pointer = Tensor | tuple[Tensor, ...] | float | None

# Releases whose sources were read: `CompiledKernel.run` takes grid, stream, function, metadata, hooks and then every
# parameter of the kernel, constants included, and an address in the place of a tensor. Others launch by Triton itself.
_SUPPORTED = ("3.6", "3.7", "3.8", "3.9")
_DIRECT = ".".join(triton.__version__.split(".")[:2]) in _SUPPORTED and torch.version.hip is None

# Bound once: they are on the path of every launch. A build of torch without CUDA lacks some.
device_of: Callable[[Tensor], int] = Tensor.get_device  # -1 on a CPU
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)

# The kept kernels of every kind of launch: by device, and by what the pointers are.
_kept: dict[Any, dict[Any, Any]] = {}
_ELSEWHERE = "elsewhere"  # a pointer to another place than the device of the launch


class Launcher:
    """Launches `kernel` on a grid of one dimension; it has everything but the pointers.

    Parameters of the kernel: pointers first, then `numbers`, then `constants`. Making one takes longer than launching
    it, so callers cache them.
    """

    __slots__ = ("_grid", "_kept", "_kernel", "_numbers", "_options", "_rest")

    def __init__(
        self, kernel: Any, grid: int, numbers: tuple[Any, ...], constants: Mapping[str, Any], **options: Any
    ) -> None:
        self._kernel, self._grid, self._numbers = kernel, grid, numbers
        self._options = {**constants, **options}
        names = kernel.arg_names[len(kernel.arg_names) - len(constants) :]
        assert set(names) == set(constants), f"{names} are the last parameters, got the constants {list(constants)}"
        values = tuple(constants[name] for name in names)
        self._rest = (*numbers, *values)
        self._kept: dict[Any, Any] | None = None
        if _DIRECT and isinstance(kernel, JITFunction):  # the interpreter has kernels of another class
            numbered = kernel.params[len(kernel.params) - len(self._rest) : len(kernel.params) - len(constants)]
            kinds = tuple(
                _kind(x, not parameter.do_not_specialize) for x, parameter in zip(numbers, numbered, strict=True)
            )
            kind = (kernel, kinds, values, tuple(map(type, values)), tuple(sorted(options.items())))
            self._kept = _kept.setdefault(kind, {})

    def __call__(self, *pointers: Pointer) -> None:
        """Launch on the device of the first tensor and its current stream. CPU tensors need the interpreter."""
        first = pointers[0][0] if isinstance(pointers[0], tuple) else pointers[0]
        assert isinstance(first, Tensor)
        device = device_of(first)
        if self._kept is None or device < 0:
            with on_device_of(first):
                self._by_triton(pointers)
        elif device == current_device():
            self._directly(device, pointers)
        else:
            with torch.cuda.device(device):
                self._directly(device, pointers)

    def _by_triton(self, pointers: tuple[Pointer, ...]) -> Any:
        return self._kernel[(self._grid,)](*pointers, *self._numbers, **self._options)

    def _directly(self, device: int, pointers: tuple[Pointer, ...]) -> None:
        assert self._kept is not None
        kinds: list[object] = [device]
        arguments = _addresses(pointers, device, kinds)
        key = tuple(kinds)
        kernel = self._kept.get(key)
        if kernel is None or _observed(self._kernel):
            kernel = self._by_triton(pointers)
            # Triton asks the driver about pointers to other places; an address would not be checked.
            if (
                isinstance(kernel, CompiledKernel)
                and kernel.metadata.target.backend == "cuda"
                and _ELSEWHERE not in key
            ):
                self._kept[key] = kernel
            return
        kernel.run(
            *(self._grid, 1, 1, current_stream(device), kernel.function, kernel.packed_metadata),
            *(None, None, None),  # no metadata, since there are no hooks
            *arguments,
            *self._rest,
        )


def _addresses(pointers: tuple[Pointer, ...], device: int, kinds: list[object]) -> list[Any]:
    """Addresses in the place of tensors; appends to `kinds` what Triton specialises a kernel for."""
    arguments: list[Any] = []
    for pointer in pointers:
        if isinstance(pointer, Tensor):
            address = pointer.data_ptr()
            arguments.append(address)
            kinds.append(pointer.dtype)
            kinds.append(address % 16 == 0 if device_of(pointer) == device else _ELSEWHERE)
        elif isinstance(pointer, tuple):
            kinds.append(len(pointer))
            arguments.append(tuple(_addresses(pointer, device, kinds)))
        else:
            assert pointer is None or type(pointer) is float, f"a number must be a float, got {pointer!r}"
            arguments.append(pointer)
            kinds.append(type(pointer))
    return arguments


def _kind(number: Any, specialised: bool) -> object:
    """What Triton specialises a kernel for, or finer; numbers in tuples are always specialised."""
    if isinstance(number, tuple):
        return tuple(_kind(x, True) for x in number)
    if type(number) is int:
        width = (-(2**31) <= number < 2**31, -(2**63) <= number < 2**63)
        return (*width, number == 1, number % 16 == 0) if specialised else width
    assert type(number) is float, f"a number must be an int or a float, got {number!r}"
    return float


def _observed(kernel: Any) -> bool:
    """Whether somebody, a profiler for example, wants to see launches: Triton's own calls their hooks."""
    enter, leave = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    # Chains of hooks, unless somebody has put something else in their place.
    return bool(kernel.pre_run_hooks or getattr(enter, "calls", True) or getattr(leave, "calls", True))
