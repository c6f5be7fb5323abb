"""The `cuda` backend: turns CUDA tensors into addresses, strides and dtype codes for the kernels of `_C`.

Contracts of the six functions: `camkd_fast.reference`. Nothing here synchronises with the host; launches go to the
tensors' device and its current stream, so every call can be captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _C
from .native import DTYPE_CODES, feature_pairs, matrix, sizes, weights_of

# Device-side assertions on labels; they stop the context.
DEBUG = os.environ.get("CAMKD_FAST_DEBUG") == "1"


def build() -> tuple[bool, str]:
    """Whether the compiled module has CUDA kernels, and for which architectures, or why not."""
    return _C.cuda_build()


@functools.cache
def built_for(capability: tuple[int, int]) -> bool:
    """Whether the module's machine code or PTX runs on a GPU of that compute capability.

    Machine code ("80-real") runs on its own major version from its minor version on, PTX ("90-virtual") on all later
    GPUs, "90" is both; what a letter marks runs on no other GPU.
    """
    for arch in build()[1].split():
        number, _, kind = arch.partition("-")
        of = divmod(int(number.rstrip("af")), 10)
        later = number.isdigit() and of < capability and (kind != "real" or of[0] == capability[0])
        if of == capability or later:
            return True
    return False


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(tensor.device)


def _stream_of(tensor: Tensor) -> int:
    return int(torch.cuda.current_stream(tensor.device).cuda_stream)


def _dense(tensor: Tensor) -> Tensor:
    """(K, N) or (N,) numbers in fp32 without strides, of which the kernels know none."""
    return tensor.contiguous()


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
    residual_scale: float | Tensor | None,
    mean: bool = False,
) -> tuple[Tensor, Tensor | None, None, tuple[Tensor, Tensor] | None]:
    N, C, inner = sizes(student)
    K, device = len(teachers), student.device
    numbers = torch.empty((3 + 3 * K, N), dtype=torch.float32, device=device)
    # The loss apart from the others: a caller may write to it.
    means = [torch.empty(shape, dtype=torch.float32, device=device) for shape in ((), (3,))] if mean else []
    residual = torch.empty((N, C), dtype=student.dtype, device=device) if needs_grad else None
    factor = residual_scale if isinstance(residual_scale, Tensor) else None
    with _device_of(student):
        _C.cuda_row_loss(
            (N, C, inner),
            [matrix(logits) for logits in (student, *teachers)],
            target.data_ptr(),
            (float(temperature), float(hard_weight), float(soft_weight), weighting, ignore_index),
            weights_of(weighting),
            numbers.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            1.0 if residual_scale is None or isinstance(residual_scale, Tensor) else float(residual_scale),
            0 if factor is None else factor.data_ptr(),
            (means[0].data_ptr(), means[1].data_ptr()) if mean else (0, 0),
            DEBUG,
            _stream_of(student),
        )
    return numbers, residual, None, (means[0], means[1]) if mean else None


def scale_rows(residual: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    N, C = residual.shape
    factor = _dense(factor)
    with _device_of(residual):
        _C.cuda_scale_rows(
            N,
            C,
            residual.data_ptr(),
            out.data_ptr(),
            DTYPE_CODES[residual.dtype],
            factor.data_ptr(),
            0 if factor.numel() == 1 else 1,
            _stream_of(residual),
        )
    return out


def confidence_forward(logits: Sequence[Tensor], target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    N, C, inner = sizes(logits[0])
    weights, ce, lse = (torch.empty((len(logits), N), dtype=torch.float32, device=target.device) for _ in range(3))
    with _device_of(target):
        _C.cuda_confidence_forward(
            (N, C, inner),
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
    N, C, inner = sizes(logits[0])
    grads = [torch.empty((N, C), dtype=z.dtype, device=z.device) for z in logits]
    lse, grad_ce = _dense(lse), _dense(grad_ce)
    with _device_of(target):
        _C.cuda_confidence_backward(
            (N, C, inner),
            [matrix(z) for z in logits],
            target.data_ptr(),
            lse.data_ptr(),
            grad_ce.data_ptr(),
            [grad.data_ptr() for grad in grads],
            _stream_of(target),
        )
    return grads


def feature_forward(student: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    N = student[0].shape[0]
    error = torch.empty((len(student), N), dtype=torch.float32, device=student[0].device)
    with _device_of(error):
        _C.cuda_feature_forward(*feature_pairs(student, teachers), error.data_ptr(), _stream_of(error))
    return error


def feature_backward(student: Sequence[Tensor], teachers: Sequence[Tensor], grad_error: Tensor) -> list[Tensor]:
    grads = [torch.empty(r.shape, dtype=r.dtype, device=r.device) for r in student]
    grad_error = _dense(grad_error)
    with _device_of(grad_error):
        _C.cuda_feature_backward(
            *feature_pairs(student, teachers),
            grad_error.data_ptr(),
            [grad.data_ptr() for grad in grads],
            _stream_of(grad_error),
        )
    return grads
