"""The `cpu` backend: calls the CPU kernels of the compiled module `_C`. Contracts: `contract.Backend`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils import deterministic

from .. import _C
from ..losses.formula import Formula
from .compiled import DTYPE_CODES, address_of, matrix, pairs_of, shape_of, weights_of
from .contract import RowLossResult, WholeLoss, row_stats_count

# Named in every allocation, because a default device may be set.
_DEVICE = torch.device("cpu")

# torch >= 2.10 lets C++ read and make tensors itself.
_CONNECTED = _C.connect_tensors(getattr(Tensor, "__dlpack_c_exchange_api__", None), Tensor, torch.nn.Parameter)


are_dense = _C.are_dense  # see `memory`


def instruction_set() -> str:
    """The instruction set chosen for this processor (or by CAMKD_FAST_ISA): "baseline", "avx2" or "avx512"."""
    return str(_C.instruction_set())


def count_labels(target: Tensor, C: int, ignore_index: int) -> tuple[int, int | None]:
    """See `contract.LabelCounter`."""
    valid, has_invalid, invalid = _C.count_labels(target.data_ptr(), target.numel(), C, ignore_index)
    return valid, invalid if has_invalid else None


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
    return torch._C._get_deterministic_algorithms() and bool(deterministic.fill_uninitialized_memory)  # type: ignore[attr-defined]


def logit_loss(
    student: Tensor,
    teachers: Tensor | Sequence[Tensor],
    target: Tensor,
    formula: Formula,
    reduction: str,
    num_items: float | Tensor | None,
    loss_scale: float | Tensor | None,
) -> WholeLoss | None:
    """See `contract.WholeLossBackend`."""
    if not _CONNECTED:
        return None
    found = _C.logit_loss(
        *(student, teachers, target, formula, reduction, num_items, loss_scale, torch.is_grad_enabled()),
        torch.get_num_threads(),
        _fills_memory(),
    )
    if found is None:
        return None
    loss, row_stats, grad_student, sums, inverse = found
    return WholeLoss(loss, row_stats, grad_student, sums, None, inverse)


def row_loss(
    student: Tensor,
    teachers: Sequence[Tensor],
    target: Tensor,
    formula: Formula,
    *,
    needs_grad: bool,
    grad_scale: float | Tensor = 1.0,
    mean: bool = False,
) -> RowLossResult:
    N, C, _ = shape = shape_of(student)
    row_stats = torch.empty(row_stats_count(len(teachers)), N, dtype=torch.float32, device=_DEVICE)
    grad_student = new_output(N, C, student.dtype) if needs_grad else None
    inverse = 1.0 / max(count_labels(target, C, formula.ignore_index)[0], 1) if mean else 1.0
    sums = _C.row_loss(
        shape,
        [matrix(logits) for logits in (student, *teachers)],
        target.data_ptr(),
        formula,
        weights_of(formula),
        row_stats.data_ptr(),
        address_of(grad_student),
        float(grad_scale) * inverse,
        torch.get_num_threads(),
    )
    means = None
    if mean:
        loss, hard, soft = (value * inverse for value in sums)
        numbers = torch.tensor([loss, hard, soft, inverse], dtype=torch.float32, device=_DEVICE)
        means = numbers[0].clone(), numbers[1:]
    return RowLossResult(row_stats, grad_student, sums, means)


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


def confidence_forward(logits: Sequence[Tensor], target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = shape_of(logits[0])
    weights, ce, lse = (torch.empty((len(logits), shape[0]), dtype=torch.float32, device=_DEVICE) for _ in range(3))
    _C.confidence_forward(
        shape,
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
    N, C, _ = shape = shape_of(logits[0])
    grads = [new_output(N, C, z.dtype) for z in logits]
    grad_ce = grad_ce.contiguous()
    _C.confidence_backward(
        shape,
        [matrix(z) for z in logits],
        target.data_ptr(),
        lse.data_ptr(),
        grad_ce.data_ptr(),
        [grad.data_ptr() for grad in grads],
        torch.get_num_threads(),
    )
    return grads


def feature_forward(student: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    error = torch.empty((len(student), student[0].shape[0]), dtype=torch.float32, device=_DEVICE)
    _C.feature_forward(*pairs_of(student, teachers), error.data_ptr(), torch.get_num_threads())
    return error


def feature_backward(student: Sequence[Tensor], teachers: Sequence[Tensor], grad_error: Tensor) -> list[Tensor]:
    grads = [new_output(r.shape[0], r.shape[1], r.dtype) for r in student]
    grad_error = grad_error.contiguous()
    _C.feature_backward(
        *pairs_of(student, teachers),
        grad_error.data_ptr(),
        [grad.data_ptr() for grad in grads],
        torch.get_num_threads(),
    )
    return grads
