"""The `cpu` backend: turns tensors into addresses, strides and dtype codes for the compiled module `_C`.

Contracts of the six functions: `camkd_fast.reference`. Importing this module fails where `_C` was not built.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils import deterministic

from . import _C  # after torch, whose OpenMP runtime it shares

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

Matrix = tuple[int, int, int, int]
MeanLoss = tuple[Tensor, Tensor, Tensor | None, tuple[float, float, float], float]

# torch >= 2.10 lets C++ read and make tensors itself.
_CONNECTED = _C.connect_tensors(getattr(Tensor, "__dlpack_c_exchange_api__", None), Tensor, torch.nn.Parameter)


def instruction_set() -> str:
    """The instruction set chosen for this processor (or by CAMKD_FAST_ISA): "baseline", "avx2" or "avx512"."""
    return str(_C.instruction_set())


def matrix(logits: Tensor) -> Matrix:
    strides = logits.stride()
    return logits.data_ptr(), strides[0], strides[-2], DTYPE_CODES[logits.dtype]


def weights_of(weighting: str | Tensor) -> tuple[int, int, int]:
    """Address and strides of given weights (K, N); zeros for a named weighting."""
    if isinstance(weighting, Tensor):
        return weighting.data_ptr(), weighting.stride(0), weighting.stride(1)
    return 0, 0, 0


def sizes(logits: Tensor) -> tuple[int, int, int]:
    """N, C and the number of rows that share the inner stride, of (N, C) or (B, S, C) logits."""
    shape = logits.shape
    inner = shape[-2]
    return (inner if len(shape) == 2 else shape[0] * inner), shape[-1], max(inner, 1)


def count_labels(target: Tensor, C: int, ignore_index: int) -> tuple[int, int | None]:
    """How many of the labels (N,) are not `ignore_index`, and the first one outside [0, C), if any."""
    valid, offends, offender = _C.count_labels(target.data_ptr(), target.numel(), C, ignore_index)
    return valid, offender if offends else None


def new_output(N: int, C: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised memory for an (N, C) output; if large, the pages of the last such output that was freed."""
    size = N * C * dtype.itemsize
    if size < _C.RECYCLED_BYTES:
        return torch.empty(N, C, dtype=dtype)
    out = torch.frombuffer(_C.OutputMemory(size), dtype=dtype).view(N, C)
    if _poisons():
        out.fill_(torch.nan)
    return out


def _poisons() -> bool:
    """Does torch.empty fill what it returns with NaN?"""
    return torch.are_deterministic_algorithms_enabled() and bool(deterministic.fill_uninitialized_memory)  # type: ignore[attr-defined]


def mean_loss(
    student: Tensor,
    teachers: Tensor | Sequence[Tensor],
    target: Tensor,
    *,
    temperature: float,
    hard_weight: float,
    soft_weight: float,
    weighting: str | Tensor,
    ignore_index: int,
    loss_scale: float | Tensor | None,
) -> MeanLoss | None:
    """The whole mean loss of plain tensors, unchecked arguments included; None where anything is out of the ordinary.

    Returns:
        The loss, its numbers (3+3K, N), d(loss_scale * loss) / d student as (N, C) (None if there is no loss_scale
        and the student needs no gradient), the sums of the first
        three rows of the numbers, and 1 / the number of rows that are not ignored.
    """
    if not _CONNECTED:
        return None
    return _C.mean_loss(
        student,
        teachers,
        target,
        (temperature, hard_weight, soft_weight, weighting, ignore_index),
        loss_scale,
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        _poisons(),
    )


def row_loss(
    student: Tensor,
    teachers: Sequence[Tensor],
    target: Tensor,
    *,
    temperature: float,
    hard_weight: float,
    soft_weight: float,
    weighting: str | Tensor,
    ignore_index: int,
    needs_grad: bool,
    residual_scale: float | Tensor,
) -> tuple[Tensor, Tensor | None, tuple[float, float, float]]:
    N, C, inner = sizes(student)
    K = len(teachers)
    numbers = torch.empty(3 + 3 * K, N, dtype=torch.float32)
    residual = new_output(N, C, student.dtype) if needs_grad else None
    sums = _C.row_loss(
        (N, C, inner),
        [matrix(logits) for logits in (student, *teachers)],
        target.data_ptr(),
        (float(temperature), float(hard_weight), float(soft_weight), weighting, ignore_index),
        weights_of(weighting),
        numbers.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        float(residual_scale),
        torch.get_num_threads(),
    )
    return numbers, residual, sums


def scale_rows(residual: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    N, C = residual.shape
    factor = factor.contiguous()
    _C.scale_rows(
        N,
        C,
        residual.data_ptr(),
        out.data_ptr(),
        DTYPE_CODES[residual.dtype],
        factor.data_ptr(),
        0 if factor.numel() == 1 else 1,
        torch.get_num_threads(),
    )
    return out


def confidence_forward(logits: Sequence[Tensor], target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    N, C, inner = sizes(logits[0])
    weights, ce, lse = (torch.empty((len(logits), N), dtype=torch.float32) for _ in range(3))
    _C.confidence_forward(
        (N, C, inner),
        [matrix(z) for z in logits],
        target.data_ptr(),
        ignore_index,
        weights.data_ptr(),
        ce.data_ptr(),
        lse.data_ptr(),
        torch.get_num_threads(),
    )
    return weights, ce, lse


def confidence_backward(logits: Sequence[Tensor], target: Tensor, lse: Tensor, grad_ce: Tensor) -> list[Tensor]:
    N, C, inner = sizes(logits[0])
    grads = [new_output(N, C, z.dtype) for z in logits]
    grad_ce = grad_ce.contiguous()
    _C.confidence_backward(
        (N, C, inner),
        [matrix(z) for z in logits],
        target.data_ptr(),
        lse.data_ptr(),
        grad_ce.data_ptr(),
        [grad.data_ptr() for grad in grads],
        torch.get_num_threads(),
    )
    return grads


def feature_pairs(
    student: Sequence[Tensor], teachers: Sequence[Tensor]
) -> tuple[int, list[int], list[Matrix], list[Matrix]]:
    """N, the K widths, and both sides of the pairs."""
    return (
        student[0].shape[0],
        [r.shape[1] for r in student],
        [matrix(r) for r in student],
        [matrix(f) for f in teachers],
    )


def feature_forward(student: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    error = torch.empty((len(student), student[0].shape[0]), dtype=torch.float32)
    _C.feature_forward(*feature_pairs(student, teachers), error.data_ptr(), torch.get_num_threads())
    return error


def feature_backward(student: Sequence[Tensor], teachers: Sequence[Tensor], grad_error: Tensor) -> list[Tensor]:
    grads = [new_output(r.shape[0], r.shape[1], r.dtype) for r in student]
    grad_error = grad_error.contiguous()
    _C.feature_backward(
        *feature_pairs(student, teachers),
        grad_error.data_ptr(),
        [grad.data_ptr() for grad in grads],
        torch.get_num_threads(),
    )
    return grads
