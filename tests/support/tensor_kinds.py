"""Tensors that are not dense memory, and calls that are not ordinary, by name.

A member of VALUES has the values of the dense tensor it is made from, in whatever form. A member of REFUSED must be
refused by its name in the message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor
from torch.masked import masked_tensor
from torch.testing._internal.logging_tensor import LoggingTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


class Tagged(torch.Tensor):
    """A subclass without operations of its own, as torchvision's images are."""


class Counting(torch.Tensor):
    """A subclass that looks at every torch function."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


def _imaginary_part(values: Tensor) -> Tensor:
    """A lazily negated view with a column stride of 2."""
    return torch.complex(torch.full_like(values, torch.nan), -values).conj().imag


def _inference(values: Tensor) -> Tensor:
    with torch.inference_mode():
        return values.clone()


def _freed(values: Tensor) -> Tensor:
    """A view at an offset, as sharded training frees the parameters that share one buffer."""
    buffer = torch.cat([values.new_zeros(3), values.flatten()])
    view = buffer[3:].view(values.shape)
    buffer.untyped_storage().resize_(0)
    return view


def _functionalised_view(values: Tensor) -> Tensor:
    """A wrapper that names an address of its own: its offset in no storage."""
    return torch._to_functional_tensor(torch.cat([values.new_zeros(5), values.flatten()])[5:].view(values.shape))


VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "negated": lambda values: torch._neg_view(-values),
    "subclass": lambda values: values.as_subclass(Tagged),
    "negated subclass": lambda values: torch._neg_view(-values).as_subclass(Tagged),
    "subclass with torch functions": lambda values: values.as_subclass(Counting),
    "wrapper subclass": LoggingTensor,
    "functionalised": torch._to_functional_tensor,
    "functionalised view": _functionalised_view,
    "lazy copy": torch._lazy_clone,
    "inference": _inference,
}
# These exist for floating point only.
FLOATING = {
    "imaginary part": _imaginary_part,
    "parameter": lambda values: torch.nn.Parameter(values, requires_grad=False),
}

REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse_coo": lambda values: values.to_sparse(),
    "sparse_csr": lambda values: values.to_sparse_csr(),
    "sparse_csc": lambda values: values.to_sparse_csc(),
    "mkldnn": lambda values: values.to_mkldnn(),
    "quantised": lambda values: torch.quantize_per_tensor(values, 0.1, 0, torch.qint8),
    "nested": lambda values: torch.nested.nested_tensor([values]),
    "nested tensor": lambda values: torch.nested.nested_tensor([values], layout=torch.jagged),
    "uninitialised": lambda values: torch.nn.UninitializedParameter(),
    "freed": _freed,
    "MaskedTensor": lambda values: masked_tensor(values, values > 0),
}


def dense(tensor: Tensor) -> Tensor:
    """The values of a result in dense memory."""
    if torch._is_functional_tensor(tensor):
        return torch._from_functional_tensor(tensor)
    return getattr(tensor, "elem", tensor).as_subclass(torch.Tensor)


class Watching(TorchDispatchMode):
    """A mode that passes every operation on."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# Circumstances in which a call must give what it gives otherwise.
CALLS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "default device meta": lambda: torch.device("meta"),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "dispatch mode": Watching,
    "flop counter": lambda: FlopCounterMode(display=False),
    "forward-mode level": torch.autograd.forward_ad.dual_level,
    "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True),
}
