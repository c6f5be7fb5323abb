"""The `cuda` backend: calls the CUDA kernels of the compiled module `_C`. Contracts: `contract.Backend`.

Nothing here synchronises with the host; launches go to the tensors' device and its current stream, so every call can
be captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _C
from ..losses.formula import Formula
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
from .contract import (
    DEBUG,
    FeatureLossResult,
    RowLossResult,
    SecondLabels,
    new_row_outputs,
)
from .feature_maps import new_gradients
from .whole_losses import WholeLosses

_FEATURE_PARTS = _C.FEATURE_PARTS


def build() -> tuple[bool, str]:
    """Whether the compiled module has CUDA kernels, and for which architectures, or why not."""
    return _C.cuda_build()


@functools.cache
def built_for(capability: tuple[int, int]) -> bool:
    """Whether the module's machine code or PTX runs on a GPU of that compute capability.

    Machine code ("80-real") runs on GPUs of its major version from its minor version on, PTX ("90-virtual") on all
    later GPUs; "90" is both. An architecture with a letter ("90a") runs on no other GPU.
    """
    for arch in build()[1].split():
        number, _, kind = arch.partition("-")
        of = divmod(int(number.rstrip("af")), 10)
        later = number.isdigit() and of < capability and (kind != "real" or of[0] == capability[0])
        if of == capability or later:
            return True
    return False


whole_losses = WholeLosses(_C, "cuda_", lambda: (DEBUG,))


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(tensor.device)


def _stream_of(tensor: Tensor) -> int:
    return int(torch.cuda.current_stream(tensor.device).cuda_stream)


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
    row_stats, grad_student = new_row_outputs(student, len(teachers), formula, needs_grad, out)
    with _device_of(student):
        # The loss has memory of its own, since a caller may write to it.
        sizes = [(), (_C.cuda_batch_floats(row_stats.shape[1]),)] if mean else []
        means = [torch.empty(size, dtype=torch.float32, device=student.device) for size in sizes]
        addresses = (means[0].data_ptr(), means[1].data_ptr()) if mean else (0, 0)
        _row_loss(student, teachers, target, formula, row_stats, grad_student, grad_scale, second, addresses)
    return RowLossResult(row_stats, grad_student, None, (means[0], means[1][:3]) if mean else None)


def _row_loss(
    student: Tensor,
    teachers: Sequence[Tensor],
    target: Tensor,
    formula: Formula,
    row_stats: Tensor | None,
    grad_student: Tensor | None,
    grad_scale: float | Tensor = 1.0,
    second: SecondLabels | None = None,
    means: tuple[int, int] = (0, 0),
    shard: Shard = NO_SHARD,
) -> None:
    """On the current device, which is the tensors'."""
    on_device = grad_scale if isinstance(grad_scale, Tensor) else None
    _C.cuda_row_loss(
        shape_of(student),
        [matrix(logits) for logits in (student, *teachers)],
        target.data_ptr(),
        second_addresses(second),
        formula,
        weights_of(formula),
        address_of(row_stats),
        address_of(grad_student),
        1.0 if isinstance(grad_scale, Tensor) else float(grad_scale),
        address_of(on_device),
        means,
        shard,
        DEBUG,
        _stream_of(student),
    )


def row_sums(
    student: Tensor, teachers: Sequence[Tensor], target: Tensor, formula: Formula, whole: Tensor | None = None
) -> Tensor:
    """See `contract.ShardBackend`."""
    with _device_of(student):
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
    row_stats, grad_student = new_row_outputs(student, len(teachers), formula, needs_grad, out)
    with _device_of(student):
        shard = shard_of(sums := sums.contiguous())
        _row_loss(student, teachers, target, formula, row_stats, grad_student, grad_scale, shard=shard)
    return RowLossResult(row_stats, grad_student)


def scale_rows(grad: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    if whole_losses.connected and _C.cuda_scale(grad, factor, out):
        return out
    N, C = grad.shape
    factor = factor.contiguous()  # the kernels take per-row numbers without strides
    with _device_of(grad):
        _C.cuda_scale_rows(
            N,
            C,
            grad.data_ptr(),
            out.data_ptr(),
            DTYPE_CODES[grad.dtype],
            factor.data_ptr(),
            0 if factor.numel() == 1 else 1,
            _stream_of(grad),
        )
    return out


def confidence_forward(
    logits: Sequence[Tensor],
    target: Tensor,
    ignore_index: int,
    inverse_valid: Tensor | None = None,
    second: SecondLabels | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = shape_of(logits[0])
    weights, ce, lse = (
        torch.empty((len(logits), shape[0]), dtype=torch.float32, device=target.device) for _ in range(3)
    )
    with _device_of(target):
        _C.cuda_confidence_forward(
            shape,
            [matrix(z) for z in logits],
            target.data_ptr(),
            second_addresses(second),
            ignore_index,
            weights.data_ptr(),
            ce.data_ptr(),
            lse.data_ptr(),
            address_of(inverse_valid),
            DEBUG,
            _stream_of(target),
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
    grads = [torch.empty((N, C), dtype=z.dtype, device=z.device) for z in logits]
    lse, grad_ce = lse.contiguous(), grad_ce.contiguous()
    with _device_of(target):
        _C.cuda_confidence_backward(
            shape,
            [matrix(z) for z in logits],
            target.data_ptr(),
            second_addresses(second),
            lse.data_ptr(),
            grad_ce.data_ptr(),
            [grad.data_ptr() for grad in grads],
            _stream_of(target),
        )
    return grads


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
    error = _new_errors(student)
    loss = torch.empty((), dtype=torch.float32, device=weights.device)
    grads, buffer = new_gradients(student, together) if needs_grad else ([], None)
    _features(student, teachers, given_weights(weights), error, loss, grads, scale, grad_scale)
    return FeatureLossResult(loss, _without_scratch(error, student), grads, buffer)


def feature_forward(student: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    error = _new_errors(student)
    _features(student, teachers, NO_WEIGHTS, error, None, [])
    return _without_scratch(error, student)


def feature_backward(student: Sequence[Tensor], teachers: Sequence[Tensor], grad_error: Tensor) -> list[Tensor]:
    grads, _ = new_gradients(student, together=False)
    _features(student, teachers, given_weights(grad_error), None, None, grads)
    return grads


def _new_errors(student: Sequence[Tensor]) -> Tensor:
    """K N errors, and scratch."""
    size = len(student) * student[0].shape[0] + _FEATURE_PARTS
    return torch.empty(size, dtype=torch.float32, device=student[0].device)


def _without_scratch(error: Tensor, student: Sequence[Tensor]) -> Tensor:
    N = student[0].shape[0]
    return error.as_strided((len(student), N), (N, 1))


def _features(
    student: Sequence[Tensor],
    teachers: Sequence[Tensor],
    weights: tuple[int, int, int],
    error: Tensor | None,
    loss: Tensor | None,
    grads: Sequence[Tensor],
    scale: float | Tensor = 1.0,
    grad_scale: float | Tensor = 1.0,
) -> None:
    pairs, _copies = map_pairs(student, teachers)
    with _device_of(student[0]):
        _C.cuda_features(
            student[0].shape[0],
            pairs,
            weights,
            address_of(error),
            address_of(loss),
            [grad.data_ptr() for grad in grads],
            _factor(scale),
            _factor(grad_scale),
            _stream_of(student[0]),
        )


def _factor(scale: float | Tensor) -> tuple[float, int]:
    """A number and the address of a factor on the device, or 0."""
    return (1.0, scale.data_ptr()) if isinstance(scale, Tensor) else (float(scale), 0)
