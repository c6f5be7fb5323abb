"""Host side of every launch: layouts, strides, alignment and the device guard."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# 8 elements are 16 bytes in the narrowest dtype; alignment beyond one access gains nothing.
_MAX_ALIGN = 8


class Layout(NamedTuple):
    """What a launch depends on, of a tensor: everything but its address."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    aligned: bool  # to 16 bytes


def layouts(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """The fields of each tensor's Layout, hashable. Tuples, because a NamedTuple takes longer than the rest."""
    return tuple([(x.dtype, x.shape, x.stride(), x.data_ptr() % 16 == 0) for x in tensors])


def row_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(N, S, C) of logits of that shape: row n starts at (n // S) * outer + (n % S) * inner."""
    S = shape[1] if len(shape) == 3 else 1
    return shape[0] * S, S, shape[-1]


def _row_strides(logits: Layout) -> tuple[int, int]:
    """(outer, inner) in elements; 0 for a dimension of size 1, whose stride is arbitrary in torch."""
    strides = [stride if size > 1 else 0 for size, stride in zip(logits.shape[:-1], logits.strides, strict=False)]
    return (strides[0], strides[1]) if len(strides) == 2 else (strides[0], 0)


def alignment(tensors: Sequence[Layout]) -> int:
    """Largest power of 2, at most 8, that divides the width and every row stride; 1 if a tensor is not 16-byte aligned.

    Kernels take widths and strides in units of it. The compiler then knows that rows start, and the column mask ends,
    at such a multiple, as wide loads require. Triton's own specialisation only recognises multiples of 16, so C = 100
    or C = 1000 would be read one element at a time. Rows of odd width start at any address and are read element by
    element; a padded row stride does not help, since the mask ends at an odd column.
    """
    numbers: list[int] = []
    for tensor in tensors:
        numbers += (*_row_strides(tensor), tensor.shape[-1])
    return common_alignment(all(tensor.aligned for tensor in tensors), numbers)


def common_alignment(aligned: bool, numbers: Sequence[int]) -> int:
    """Largest power of 2, at most 8, that divides all `numbers`; 1 if not all tensors are 16-byte aligned."""
    if not aligned:
        return 1
    bits = _MAX_ALIGN
    for number in numbers:
        bits |= number
    return bits & -bits


def stride_units(tensors: Sequence[Layout], ALIGN: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Outer and inner row strides of these tensors, in units of ALIGN."""
    strides = [_row_strides(tensor) for tensor in tensors]
    return tuple(outer // ALIGN for outer, _ in strides), tuple(inner // ALIGN for _, inner in strides)


def unspecialised(strides: Sequence[int]) -> tuple[int, ...]:
    """Strides as a tuple argument; the kernel decodes them with `softmax.stride`.

    Inside a tuple Triton recompiles for numbers that are 1 or divisible by 16, whatever `do_not_specialize` says, and
    a new batch size would change strides from one kind to the other. 2 * stride + 3 is never either.
    """
    return tuple(2 * stride + 3 for stride in strides)


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device; CPU tensors (interpreter) have none."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
