"""How the feature maps of student and teacher lie in memory, so that kernels read both in place.

A gradient takes the memory order of the student's map: then autograd passes it on without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

Strides = tuple[int, int, int]  # of samples, P and Q, in elements

# Gradients that share memory begin at multiples of so many elements: 64 bytes or more.
_ALIGNMENT = 32


class MapPair(NamedTuple):
    """Two maps (N, ...) of one shape as N samples of P x Q values, in the memory order of the gradient.

    With P = 1 and both strides of Q equal to 1, samples are dense rows.
    """

    student: Tensor
    teacher: Tensor
    P: int
    Q: int
    student_strides: Strides
    teacher_strides: Strides


def sample_size(maps: Tensor) -> int:
    """M: values of one sample of (N, ...)."""
    return math.prod(maps.shape[1:])


def map_pair(student: Tensor, teacher: Tensor) -> MapPair:
    """The pair in place wherever two strides describe a sample of each; otherwise one or both are copied."""
    if _same_format(student, teacher):
        M = sample_size(student)
        return MapPair(student, teacher, 1, M, (M, 0, 1), (M, 0, 1))
    order = _order(student)
    for _ in range(2):
        merged = _merged(order, student, teacher)
        if len(merged) <= 2:
            break
        strides = gradient_strides(student)
        student, teacher = in_memory_order(student, strides), in_memory_order(teacher, strides)
    (P, *p), (Q, *q) = [(1, 0, 0), (1, 1, 1)][: 2 - len(merged)] + merged
    student_strides, teacher_strides = ((x.stride(0), p[i], q[i]) for i, x in enumerate((student, teacher)))
    return MapPair(student, teacher, P, Q, student_strides, teacher_strides)


def gradient_strides(student: Tensor) -> tuple[int, ...]:
    """Strides of the gradient of a map (N, ...): samples in the student's own order if they are dense."""
    if student.is_contiguous():
        return student.stride()
    if _is_dense(student):
        return (sample_size(student), *student.stride()[1:])
    return tuple(math.prod(student.shape[d + 1 :]) for d in range(student.dim()))


def new_gradients(
    student: Sequence[Tensor], together: bool, allocate: Callable[..., Tensor] | None = None
) -> tuple[list[Tensor], Tensor | None]:
    """Uninitialised gradients of K maps; with `together` also the one buffer (size,) that holds them all.

    Args:
        allocate: a flat tensor of so many elements, with the keyword `dtype`; None for torch's own memory.
    """
    device = student[0].device
    if not together and allocate is None:
        return [torch.empty_strided(r.shape, gradient_strides(r), dtype=r.dtype, device=device) for r in student], None
    allocate = allocate or partial(torch.empty, device=device)
    if not together:
        grads = [allocate(r.numel(), dtype=r.dtype).as_strided(r.shape, gradient_strides(r)) for r in student]
        return grads, None
    buffer = allocate(sum(_padded(r.numel()) for r in student), dtype=student[0].dtype)
    grads, begin = [], 0
    for r in student:
        grads.append(buffer.as_strided(r.shape, gradient_strides(r), begin))
        begin += _padded(r.numel())
    return grads, buffer


def _padded(elements: int) -> int:
    return -(-elements // _ALIGNMENT) * _ALIGNMENT


def _same_format(student: Tensor, teacher: Tensor) -> bool:
    """Whether both are contiguous or both channels_last: the common cases of `map_pair`, found by torch itself."""
    if student.is_contiguous():
        return teacher.is_contiguous()
    return student.dim() == 4 and all(x.is_contiguous(memory_format=torch.channels_last) for x in (student, teacher))


def _is_dense(student: Tensor) -> bool:
    """Whether each sample fills a range of memory, in whatever order of its dimensions."""
    expected = 1
    for stride, size in sorted((student.stride(d), student.shape[d]) for d in range(1, student.dim())):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _order(student: Tensor) -> list[int]:
    """Dimensions of a sample from the outermost to the innermost of the gradient; those of size 1 are left out."""
    order = [d for d in range(1, student.dim()) if student.shape[d] != 1]
    return sorted(order, key=student.stride, reverse=True) if _is_dense(student) else order


def _merged(order: Sequence[int], student: Tensor, teacher: Tensor) -> list[tuple[int, int, int]]:
    """Size and both strides of the dimensions that remain when those that continue each other are merged."""
    merged: list[tuple[int, int, int]] = []
    for d in order:
        size, s, t = student.shape[d], student.stride(d), teacher.stride(d)
        if merged and merged[-1][1] == size * s and merged[-1][2] == size * t:
            size *= merged.pop()[0]
        merged.append((size, s, t))
    return merged


def in_memory_order(maps: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A copy with these strides; the tensor itself if it has them."""
    if maps.stride() == strides:
        return maps
    return torch.empty_strided(maps.shape, strides, dtype=maps.dtype, device=maps.device).copy_(maps)
