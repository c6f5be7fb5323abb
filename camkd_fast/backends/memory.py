"""The one door to memory: may a kernel take the addresses of these tensors, and may it run in this call?

A kernel reads and writes memory behind PyTorch's back. That is right for dense tensors, whose memory holds their values
as they are, in a call where no mode or transform has to see every operation. `dispatch` asks before it picks a
compiled backend; `losses.entry` asks first and sends everything else another way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter


class TensorKind(NamedTuple):
    """A kind of tensors that are not dense memory."""

    name: str  # for messages: "student_logits is <name>"
    remedy: str  # for messages; "" if PyTorch's own operations take such tensors
    resolvable: bool = False  # `resolved` gives the same values as dense memory
    fake: bool = False  # has shapes only; a registered operator takes it


DISPATCH_MODE = "a __torch_dispatch__ mode"  # see `observer`

_NEGATED = TensorKind("a lazily negated view", "call .resolve_neg()", resolvable=True)
_ZERO = TensorKind("a zero tensor without memory", "use torch.zeros_like", resolvable=True)
_FREED = TensorKind("a tensor whose storage was freed", "fill it before the call")
_TRANSFORMED = TensorKind("a tensor of a torch.func transform", "")
_WRAPPED = TensorKind("a wrapper without memory of its own", "")
_NESTED = TensorKind("a nested tensor", "use torch.nested.to_padded_tensor, and labels of ignore_index for the padding")
_QUANTISED = TensorKind("a quantised tensor", "call .dequantize()")
_UNINITIALISED = TensorKind("an uninitialised parameter", "run the lazy module once")

# Bound once, because every call of the losses asks them, and a small batch takes 40 us.
_transforms_active, _is_tracing = torch._C._are_functorch_transforms_active, torch._C._is_tracing
_dispatch_modes = torch._C._len_torch_dispatch_stack

_DEFAULT_FUNCTION = Tensor.__torch_function__.__func__  # type: ignore[attr-defined]


def _dispatches(cls: Any) -> bool:
    """Whether a subclass of Tensor replaces PyTorch's operations, so that its memory may mean something else."""
    if cls.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
        return True
    function = getattr(cls.__torch_function__, "__func__", torch._C._disabled_torch_function_impl)
    return function not in (_DEFAULT_FUNCTION, torch._C._disabled_torch_function_impl)


@functools.cache
def _kind_of_class(cls: type) -> TensorKind:
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    if issubclass(cls, (UninitializedParameter, UninitializedBuffer)):
        return _UNINITIALISED
    if not _dispatches(cls):
        return TensorKind(f"a {cls.__name__}", "call .as_subclass(torch.Tensor)", resolvable=True)
    return TensorKind(f"a {cls.__name__}", "", fake=issubclass(cls, (FakeTensor, FunctionalTensor)))


def kind_of(tensor: Tensor) -> TensorKind | None:
    """What else than dense memory `tensor` is; None if it is dense, on whatever device."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return _NESTED if tensor.is_nested else _kind_of_class(type(tensor))
    if tensor.is_nested:
        return _NESTED
    if tensor.layout != torch.strided:
        layout = str(tensor.layout).removeprefix("torch.").removeprefix("_")
        return TensorKind(f"a tensor of layout {layout}", "call .to_dense()")
    if tensor.is_quantized:
        return _QUANTISED
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or torch._is_functional_tensor(tensor):
        return _TRANSFORMED
    if tensor._is_zerotensor():
        return _ZERO
    if tensor.is_neg():
        return _NEGATED
    try:
        address = tensor.data_ptr()
    except RuntimeError:
        return _WRAPPED
    if tensor.device.type not in ("cpu", "cuda") or tensor.numel() == 0:
        return None
    # The address in a null storage is the offset.
    return _FREED if address == tensor.storage_offset() * tensor.element_size() else None


def resolve(tensor: Tensor) -> tuple[Tensor, TensorKind | None]:
    """A tensor of the same values in the same graph, dense if its kind is `resolvable`; and the kind of that tensor."""
    while (kind := kind_of(tensor)) is not None and kind.resolvable:
        tensor = _resolved(tensor)
    return tensor, kind


def _resolved(tensor: Tensor) -> Tensor:
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        tensor = tensor.as_subclass(Tensor)
    if tensor._is_zerotensor():
        return tensor.new_zeros(tensor.shape)
    return tensor.resolve_neg()


@functools.cache
def _quick_check() -> Callable[..., bool] | None:
    """`_C.are_dense`, a fraction of the cost of `kind_of`; None without the module."""
    try:
        from . import cpu
    except ImportError:
        return None
    return cpu.are_dense


def are_dense(tensors: Sequence[Tensor]) -> bool:
    """Whether all of them are dense memory."""
    quick = _quick_check()
    return (quick is not None and quick(*tensors)) or all(kind_of(tensor) is None for tensor in tensors)


def observer() -> str | None:
    """Which mode or transform has to see every operation of this call; None in an ordinary call."""
    if _transforms_active():
        return "a torch.func transform"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    if _is_tracing():
        return "torch.jit.trace"
    return DISPATCH_MODE if _dispatch_modes() else None


def is_ordinary(tensors: Sequence[Tensor]) -> bool:
    """Whether kernels may take the addresses of these tensors now."""
    return are_dense(tensors) and observer() is None
