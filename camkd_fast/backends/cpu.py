"""The `cpu` backend: calls the CPU kernels of the compiled module `_C`. Contracts: `contract.Backend`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils import deterministic

from .. import _C
from ..losses.formula import Formula
from . import reference
from .compiled import (
    DTYPE_CODES,
    NO_SHARD,
    NO_WEIGHTS,
    Shard,
    address_of,
    given_weights,
    map_pairs,
    matrix,
    new_sums,
    second_addresses,
    shape_of,
    shard_of,
    weights_of,
)
from .contract import FeatureLossResult, RowLossResult, SecondLabels, new_row_outputs
from .feature_maps import new_gradients
from .whole_losses import WholeLosses

# Named in every allocation, because a default device may be set.
_DEVICE = torch.device("cpu")

are_dense = _C.are_dense  # see `memory`
_is_deterministic: Callable[[], bool] = torch._C._get_deterministic_algorithms


def instruction_set() -> str:
    """The instruction set chosen for this processor (or by CAMKD_FAST_ISA): "baseline", "avx2" or "avx512"."""
    return str(_C.instruction_set())


def count_labels(
    target: Tensor, C: int, ignore_index: int, second: SecondLabels | None = None
) -> tuple[int, int | None]:
    """See `contract.LabelCounter`."""
    if second is not None and second.mix.dtype != torch.float32:  # of float64 logits
        return reference.count_labels(target, C, ignore_index, second)
    valid, row = _C.count_labels(target.data_ptr(), second_addresses(second), target.numel(), C, ignore_index)
    return valid, None if row < 0 else row


def new_output(N: int, C: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised memory for an (N, C) output; if large, the pages of the last such output that was freed."""
    size = N * C * dtype.itemsize
    if size < _C.RECYCLED_BYTES:
        return torch.empty(N, C, dtype=dtype, device=_DEVICE)
    out = torch.frombuffer(_C.OutputMemory(size), dtype=dtype).view(N, C)
    if _fills_memory():
        out.fill_(torch.nan)
    return out


def _fills_memory() -> bool:
    """Does torch.empty fill its result with NaN?"""
    return _is_deterministic() and bool(deterministic.fill_uninitialized_memory)  # type: ignore[attr-defined]


# Threads, and whether new memory is to be filled
whole_losses = WholeLosses(_C, "", lambda: (torch.get_num_threads(), _fills_memory()))


def row_loss(
    student: Tensor,
    teachers: Sequence[Tensor],
    target: Tensor,
    formula: Formula,
    *,
    needs_grad: bool,
    grad_scale: float | Tensor = 1.0,
    mean: bool = False,
    total_scale: float | None = None,
    second: SecondLabels | None = None,
    out: Tensor | None = None,
) -> RowLossResult:
    row_stats, grad_student = _outputs(student, len(teachers), formula, needs_grad, out)
    inverse = 1.0 / max(count_labels(target, student.shape[-1], formula.ignore_index)[0], 1) if mean else 1.0
    scale = float(grad_scale) * inverse
    sums = _row_loss(student, teachers, target, formula, row_stats, grad_student, scale, second)
    means = None
    if mean:
        loss, hard, soft = (value * inverse for value in sums)
        numbers = torch.tensor([loss, hard, soft, inverse], dtype=torch.float32, device=_DEVICE)
        means = numbers[0].clone(), numbers[1:]
    return RowLossResult(row_stats, grad_student, sums, means)


def _outputs(
    student: Tensor, K: int, formula: Formula, needs_grad: bool, out: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`new_row_outputs` whose gradient is a `new_output`."""
    if needs_grad and out is None:
        out = new_output(student.shape[:-1].numel(), student.shape[-1], student.dtype)
    return new_row_outputs(student, K, formula, needs_grad, out)


def _row_loss(
    student: Tensor,
    teachers: Sequence[Tensor],
    target: Tensor,
    formula: Formula,
    row_stats: Tensor | None,
    grad_student: Tensor | None,
    grad_scale: float = 1.0,
    second: SecondLabels | None = None,
    shard: Shard = NO_SHARD,
) -> tuple[float, float, float]:
    return _C.row_loss(
        shape_of(student),
        [matrix(logits) for logits in (student, *teachers)],
        target.data_ptr(),
        second_addresses(second),
        formula,
        weights_of(formula),
        address_of(row_stats),
        address_of(grad_student),
        grad_scale,
        shard,
        torch.get_num_threads(),
    )


def row_sums(
    student: Tensor, teachers: Sequence[Tensor], target: Tensor, formula: Formula, whole: Tensor | None = None
) -> Tensor:
    """See `contract.ShardBackend`."""
    sums, shard = new_sums(whole, len(teachers), target)
    _row_loss(student, teachers, target, formula, None, None, shard=shard)
    return sums


def row_results(
    student: Tensor,
    teachers: Sequence[Tensor],
    target: Tensor,
    formula: Formula,
    sums: Tensor,
    *,
    needs_grad: bool,
    grad_scale: float | Tensor = 1.0,
    out: Tensor | None = None,
) -> RowLossResult:
    row_stats, grad_student = _outputs(student, len(teachers), formula, needs_grad, out)
    shard = shard_of(sums := sums.contiguous())
    _row_loss(student, teachers, target, formula, row_stats, grad_student, float(grad_scale), shard=shard)
    return RowLossResult(row_stats, grad_student)


def scale_rows(grad: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    N, C = grad.shape
    factor = factor.contiguous()
    _C.scale_rows(
        N,
        C,
        grad.data_ptr(),
        out.data_ptr(),
        DTYPE_CODES[grad.dtype],
        factor.data_ptr(),
        0 if factor.numel() == 1 else 1,
        torch.get_num_threads(),
    )
    return out


def confidence_forward(
    logits: Sequence[Tensor],
    target: Tensor,
    ignore_index: int,
    inverse_valid: Tensor | None = None,
    second: SecondLabels | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    if inverse_valid is not None:
        inverse_valid.fill_(1.0 / max(count_labels(target, logits[0].shape[-1], ignore_index)[0], 1))
    shape = shape_of(logits[0])
    weights, ce, lse = (torch.empty((len(logits), shape[0]), dtype=torch.float32, device=_DEVICE) for _ in range(3))
    _C.confidence_forward(
        shape,
        [matrix(z) for z in logits],
        target.data_ptr(),
        second_addresses(second),
        ignore_index,
        weights.data_ptr(),
        ce.data_ptr(),
        lse.data_ptr(),
        torch.get_num_threads(),
    )
    return weights, ce, lse


def confidence_backward(
    logits: Sequence[Tensor],
    target: Tensor,
    lse: Tensor,
    grad_ce: Tensor,
    second: SecondLabels | None = None,
) -> list[Tensor]:
    N, C, _ = shape = shape_of(logits[0])
    grads = [new_output(N, C, z.dtype) for z in logits]
    lse, grad_ce = lse.contiguous(), grad_ce.contiguous()
    _C.confidence_backward(
        shape,
        [matrix(z) for z in logits],
        target.data_ptr(),
        second_addresses(second),
        lse.data_ptr(),
        grad_ce.data_ptr(),
        [grad.data_ptr() for grad in grads],
        torch.get_num_threads(),
    )
    return grads


def _new_buffer(size: int, dtype: torch.dtype) -> Tensor:
    return new_output(1, size, dtype).view(-1)


def feature_loss(
    student: Sequence[Tensor],
    teachers: Sequence[Tensor],
    weights: Tensor,
    *,
    needs_grad: bool,
    scale: float | Tensor = 1.0,
    grad_scale: float | Tensor = 1.0,
    together: bool = False,
) -> FeatureLossResult:
    pairs, _copies = map_pairs(student, teachers)
    error = torch.empty((len(student), student[0].shape[0]), dtype=torch.float32, device=_DEVICE)
    loss = torch.empty((), dtype=torch.float32, device=_DEVICE)
    grads, buffer = new_gradients(student, together, _new_buffer) if needs_grad else ([], None)
    _C.features(
        student[0].shape[0],
        pairs,
        given_weights(weights),
        error.data_ptr(),
        loss.data_ptr(),
        [grad.data_ptr() for grad in grads],
        float(scale),
        float(grad_scale),
        torch.get_num_threads(),
    )
    return FeatureLossResult(loss, error, grads, buffer)


def feature_forward(student: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    N = student[0].shape[0]
    pairs, _copies = map_pairs(student, teachers)
    error = torch.empty((len(student), N), dtype=torch.float32, device=_DEVICE)
    _C.features(N, pairs, NO_WEIGHTS, error.data_ptr(), 0, [], 1.0, 1.0, torch.get_num_threads())
    return error


def feature_backward(student: Sequence[Tensor], teachers: Sequence[Tensor], grad_error: Tensor) -> list[Tensor]:
    pairs, _copies = map_pairs(student, teachers)
    grads, _ = new_gradients(student, False, _new_buffer)
    addresses = [grad.data_ptr() for grad in grads]
    N, weights = student[0].shape[0], given_weights(grad_error)
    _C.features(N, pairs, weights, 0, 0, addresses, 1.0, 1.0, torch.get_num_threads())
    return grads
