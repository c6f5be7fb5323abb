"""How a call of the public functions is computed, decided by its tensors and by the modes it runs in.

KERNEL      dense tensors in an ordinary call: a backend, by address
OPERATOR    a registered operator: torch.compile, dispatch modes (make_fx, FakeTensorMode) and tensors with shapes only
EXPRESSION  the reference as PyTorch operations, differentiable any number of times: torch.func transforms, forward-mode
            differentiation, torch.jit.trace and subclasses with operations of their own (DTensor)
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..backends import memory
from ..backends.dispatch import choose
from ..errors import first_line


class Way(enum.Enum):
    """See the module."""

    KERNEL = enum.auto()
    OPERATOR = enum.auto()
    EXPRESSION = enum.auto()


# Python 3.11 takes 45 ns to find a member of an enum, and every call asks for this one.
KERNEL = Way.KERNEL


def way_of_call() -> Way:
    """The way of a call with dense tensors."""
    if is_compiling():
        return Way.EXPRESSION if torch._C._are_functorch_transforms_active() else Way.OPERATOR
    observer = memory.observer()
    if observer is None:
        return KERNEL
    return Way.OPERATOR if observer == memory.DISPATCH_MODE else Way.EXPRESSION


def enter(way: Way, backend: str, **arguments: Any) -> tuple[Way, list[Any]]:
    """Dense tensors in place of those that have an exact equivalent, and the way for all of them.

    Args:
        way: of the call.
        backend: as requested by the caller.
        arguments: tensors and sequences of tensors by their names in messages; anything else is returned as it is.

    Raises:
        TypeError: a tensor that neither a kernel nor PyTorch's own operations take, with its kind and the remedy.
        NotImplementedError: `backend` names kernels, but no kernel can serve this call.
    """
    if is_compiling():
        return way, list(arguments.values())
    if way is Way.KERNEL and memory.are_dense(_tensors(list(arguments.values()))):
        return way, list(arguments.values())
    kinds: set[memory.TensorKind | None] = set()
    values = [_dense(name, value, kinds) for name, value in arguments.items()]
    if way is not Way.EXPRESSION and (others := kinds - {None}):
        way = Way.OPERATOR if all(kind and kind.fake for kind in others) else Way.EXPRESSION
    if way is Way.EXPRESSION:
        tensors = _tensors(values)
        if floating := [tensor for tensor in tensors if tensor.is_floating_point()]:
            choose(backend, floating, tensors)
    return way, values


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(entry for entry in value if isinstance(entry, Tensor))
    return found


def _dense(name: str, value: Any, kinds: set[memory.TensorKind | None]) -> Any:
    """`value` with its tensors resolved where that is exact; adds the kinds of the others."""
    if isinstance(value, (list, tuple)):
        return [_dense(f"{name}[{i}]", entry, kinds) for i, entry in enumerate(value)]
    if not isinstance(value, Tensor):
        return value
    value, kind = memory.resolve(value)
    if kind is not None and kind.remedy:
        raise TypeError(f"{name} must be a dense tensor, got {kind.name}: {kind.remedy}")
    kinds.add(kind)
    return value


def computing(way: Way, **arguments: Any) -> contextlib.AbstractContextManager[None]:
    """Around the computation: an error of PyTorch's operations on other than dense tensors says which argument is what.

    Raises:
        TypeError: PyTorch's own operations do not take these tensors.
    """
    return _naming(arguments) if way is Way.EXPRESSION else contextlib.nullcontext()


@contextlib.contextmanager
def _naming(arguments: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:  # NotImplementedError is a RuntimeError
        kinds = [(name, memory.kind_of(tensor)) for name, value in arguments.items() for tensor in _tensors([value])]
        found = next((f"{name} is {kind.name}" for name, kind in kinds if kind), None)
        if found is None or str(error).startswith(tuple(arguments)):  # the latter is an error of ours
            raise
        raise TypeError(
            f"{found}, which no kernel takes, and PyTorch's own operations fail: {first_line(error)}"
            "; pass dense tensors, such as those of .to_local() or .full_tensor() of a DTensor"
        ) from error
