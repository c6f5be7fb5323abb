"""The `cuda` backend: calls the CUDA kernels of the compiled module `_C`. Contracts: `contract.Backend`.

Nothing here synchronises with the host; launches go to the tensors' device and its current stream, so every call can
be captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _C
from ..losses.formula import Formula
from .compiled import DTYPE_CODES, address_of, matrix, pairs_of, shape_of, weights_of
from .contract import RowLossResult, WholeLoss, row_stats_count

# Device-side assertions on labels; they stop the context.
DEBUG = os.environ.get("CAMKD_FAST_DEBUG") == "1"


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


# torch >= 2.10 lets C++ read and make tensors itself.
_CONNECTED = _C.connect_tensors(getattr(Tensor, "__dlpack_c_exchange_api__", None), Tensor, torch.nn.Parameter)


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(tensor.device)


def _stream_of(tensor: Tensor) -> int:
    return int(torch.cuda.current_stream(tensor.device).cuda_stream)


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
    found = _C.cuda_logit_loss(
        student, teachers, target, formula, reduction, num_items, loss_scale, torch.is_grad_enabled(), DEBUG
    )
    if found is None:
        return None
    loss, row_stats, grad_student, others = found
    return WholeLoss(loss, row_stats, grad_student, None, None if others is None else (loss, others), None)


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
    device = student.device
    row_stats = torch.empty((row_stats_count(len(teachers)), N), dtype=torch.float32, device=device)
    grad_student = torch.empty((N, C), dtype=student.dtype, device=device) if needs_grad else None
    on_device = grad_scale if isinstance(grad_scale, Tensor) else None
    with _device_of(student):
        # The loss has memory of its own, since a caller may write to it.
        sizes = [(), (_C.cuda_batch_floats(N),)] if mean else []
        means = [torch.empty(size, dtype=torch.float32, device=device) for size in sizes]
        _C.cuda_row_loss(
            shape,
            [matrix(logits) for logits in (student, *teachers)],
            target.data_ptr(),
            formula,
            weights_of(formula),
            row_stats.data_ptr(),
            address_of(grad_student),
            1.0 if isinstance(grad_scale, Tensor) else float(grad_scale),
            address_of(on_device),
            (means[0].data_ptr(), means[1].data_ptr()) if mean else (0, 0),
            DEBUG,
            _stream_of(student),
        )
    return RowLossResult(row_stats, grad_student, None, (means[0], means[1][:3]) if mean else None)


def scale_rows(grad: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    if _CONNECTED and _C.cuda_scale(grad, factor, out):
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


def confidence_forward(logits: Sequence[Tensor], target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = shape_of(logits[0])
    weights, ce, lse = (
        torch.empty((len(logits), shape[0]), dtype=torch.float32, device=target.device) for _ in range(3)
    )
    with _device_of(target):
        _C.cuda_confidence_forward(
            shape,
            [matrix(z) for z in logits],
            target.data_ptr(),
            ignore_index,
            weights.data_ptr(),
            ce.data_ptr(),
            lse.data_ptr(),
            DEBUG,
            _stream_of(target),
        )
    return weights, ce, lse


def confidence_backward(logits: Sequence[Tensor], target: Tensor, lse: Tensor, grad_ce: Tensor) -> list[Tensor]:
    N, C, _ = shape = shape_of(logits[0])
    grads = [torch.empty((N, C), dtype=z.dtype, device=z.device) for z in logits]
    lse, grad_ce = lse.contiguous(), grad_ce.contiguous()
    with _device_of(target):
        _C.cuda_confidence_backward(
            shape,
            [matrix(z) for z in logits],
            target.data_ptr(),
            lse.data_ptr(),
            grad_ce.data_ptr(),
            [grad.data_ptr() for grad in grads],
            _stream_of(target),
        )
    return grads


def feature_forward(student: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    error = torch.empty((len(student), student[0].shape[0]), dtype=torch.float32, device=student[0].device)
    with _device_of(error):
        _C.cuda_feature_forward(*pairs_of(student, teachers), error.data_ptr(), _stream_of(error))
    return error


def feature_backward(student: Sequence[Tensor], teachers: Sequence[Tensor], grad_error: Tensor) -> list[Tensor]:
    grads = [torch.empty(r.shape, dtype=r.dtype, device=r.device) for r in student]
    grad_error = grad_error.contiguous()
    with _device_of(grad_error):
        _C.cuda_feature_backward(
            *pairs_of(student, teachers),
            grad_error.data_ptr(),
            [grad.data_ptr() for grad in grads],
            _stream_of(grad_error),
        )
    return grads
