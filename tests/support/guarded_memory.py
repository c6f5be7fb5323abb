"""Tensors whose last element lies before a page that must not be read, and a check of a backend with such tensors.

`python -m tests.support.guarded_memory BACKEND` runs every function of a backend (`camkd_fast.kernels`, ...) on them. A
read or write beyond a tensor ends the process by a segmentation fault.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
import os
import sys
from collections.abc import Sequence
from typing import Any

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_maps: list[mmap.mmap] = []  # unmapped with the process


def guarded_bytes(size: int, before: bool = False) -> memoryview:
    """`size` bytes of new memory that end at a page without access, or with `before` begin after one."""
    pages = -(-size // PAGE)
    whole = mmap.mmap(-1, (pages + 1) * PAGE)
    _maps.append(whole)
    start = ctypes.addressof(ctypes.c_char.from_buffer(whole))
    guard = start if before else start + pages * PAGE
    if _libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(PAGE), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    first = PAGE if before else pages * PAGE - size
    return memoryview(whole)[first : first + size]


def guarded(values: Any, before: bool = False) -> Any:
    """A contiguous copy of a tensor in such memory."""
    import torch

    memory = guarded_bytes(values.numel() * values.element_size(), before)
    return torch.frombuffer(memory, dtype=values.dtype).view(values.shape).copy_(values)


def reads_beyond() -> None:
    """Reads one byte too many, to show that it is noticed."""
    memory = guarded_bytes(10)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.string_at(address, 10) == bytes(10)
    ctypes.string_at(address, 11)


def check(backend: Any, N: int, C: int, K: int, dtypes: Sequence[Any], before: bool, weighting: str) -> None:
    """Every function of a backend on guarded tensors, some of whose rows are ignored."""
    import torch

    from camkd_fast.backends.contract import SecondLabels
    from camkd_fast.losses.formula import Formula

    def logits(dtype: Any) -> Any:
        return guarded(torch.randn(N, C).to(dtype), before)

    student, *teachers = (logits(dtypes[k % len(dtypes)]) for k in range(K + 1))
    target = guarded(torch.arange(N) % C, before)
    target[N // 2] = -100
    formula = Formula(weighting=guarded(torch.rand(K, N), before) if weighting == "given" else weighting)
    two = SecondLabels(guarded(target.flip(0).clamp(min=0), before), guarded(torch.rand(N), before))
    two.target[N // 2], two.mix[N // 2] = 1 << 40, float("nan")  # of an ignored row
    for mean, second in ((False, None), (True, None), (False, two)):
        options = {"grad_scale": guarded(torch.ones(1), before), "mean": mean, "second": second}
        result = backend.row_loss(student, teachers, target, formula, needs_grad=True, **options)
        assert result.grad_student.isfinite().all() and result.row_stats.isfinite().all()
    extended = {"divergence": ("jsd", 0.3), "entropy": True, "student_softcap": 5.0, "teacher_softcaps": (5.0,) * K}
    result = backend.row_loss(student, teachers, target, formula._replace(**extended).checked(K), needs_grad=True)
    assert result.grad_student.isfinite().all() and result.row_stats.isfinite().all()
    backend.scale_rows(student, guarded(torch.rand(N), before), student)
    grad = guarded(torch.randn(K, N), before)
    grad[:, N // 2] = 0.0
    for second in (None, two):
        _, _, lse = backend.confidence_forward(teachers, target, -100, second=second)
        grads = backend.confidence_backward(teachers, target, guarded(lse, before), grad, second)
        assert all(g.isfinite().all() for g in grads)
    backend.feature_forward([student] * K, teachers)
    backend.feature_loss([student] * K, teachers, grad, needs_grad=True)
    backend.feature_backward([student] * K, teachers, grad)


def main(name: str) -> None:
    import torch

    torch.manual_seed(0)
    backend = importlib.import_module(name)
    triton = name == "camkd_fast.kernels"
    sizes = [(3, 10, 2), (5, 33, 1)]
    if not triton:  # in the interpreter they would take minutes
        sizes += [(1, 3, 2), (3, 100, 3), (17, 2049, 2), (2, 5000, 1)]
    for N, C, K in sizes:
        for before in (False, True):
            check(backend, N, C, K, (torch.float32,), before, "confidence")
            check(backend, N, C, K, (torch.bfloat16, torch.float16), before, "given")
    if triton:  # rows in blocks of columns
        module = importlib.import_module("camkd_fast.kernels.row_loss")
        module.on_chip = lambda *shape: False
        module.row_launcher.cache_clear()
        for before in (False, True):
            check(backend, 3, 100, 2, (torch.float32,), before, "entropy")


if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if sys.argv[1] == "reads_beyond":
        reads_beyond()
    else:
        main(sys.argv[1])
