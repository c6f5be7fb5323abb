"""Mean squared feature error of each sample and teacher, and its gradient; one launch per teacher, whose M differ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import elementwise_launch, feature_launch
from .layout import alignment, on_device_of, stride_units


@triton.jit(do_not_specialize=["stride_sn", "stride_tn", "M_units"])
def feature_fwd_kernel(
    student, teacher,  # (N, M) each
    error,  # (N,) fp32
    stride_sn, stride_tn,
    M_units,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One sample per program; threads sum their own columns and reduce once, at the end."""
    n = tl.program_id(0).to(tl.int64)
    M = M_units * ALIGN
    s_row = student + n * stride_sn * ALIGN
    t_row = teacher + n * stride_tn * ALIGN
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, M, BLOCK_M):
        cols = start + tl.arange(0, BLOCK_M)
        s = tl.load(s_row + cols, mask=cols < M, other=0.0).to(tl.float32)
        t = tl.load(t_row + cols, mask=cols < M, other=0.0).to(tl.float32)
        squares += (s - t) * (s - t)
    tl.store(error + n, tl.sum(squares, axis=0) / tl.cast(M, tl.float32))


@triton.jit(do_not_specialize=["stride_sn", "stride_tn", "stride_gn", "N", "M_units"])
def feature_bwd_kernel(
    student, teacher,  # (N, M) each
    grad_error,  # (N,) fp32
    grad,  # (N, M) contiguous
    stride_sn, stride_tn, stride_gn,
    N, M_units,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    M = M_units * ALIGN
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(M, BLOCK_M)
    n = (pid // blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = (pid % blocks).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = (n < N)[:, None] & (cols < M)[None, :]
    g = tl.load(grad_error + n * stride_gn, mask=n < N, other=0.0) * (2.0 / tl.cast(M, tl.float32))
    s_row = student + n * stride_sn * ALIGN
    t_row = teacher + n * stride_tn * ALIGN
    s = tl.load(s_row[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    t = tl.load(t_row[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    pointers = grad + n[:, None] * M + cols[None, :]
    tl.store(pointers, (g[:, None] * (s - t)).to(grad.dtype.element_ty), mask=mask)


def feature_forward(student: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """See `contract.Backend`."""
    N = student[0].shape[0]
    error = torch.empty((len(student), N), dtype=torch.float32, device=student[0].device)
    if N == 0:
        return error
    with on_device_of(error):
        for r, f, error_k in zip(student, teachers, error.unbind(), strict=True):
            ALIGN = alignment([r, f])
            (stride_sn, stride_tn), _ = stride_units([r, f], ALIGN)
            _, BLOCK_M, num_warps = feature_launch(max(r.element_size(), f.element_size()))
            feature_fwd_kernel[(N,)](
                *(r, f, error_k, stride_sn, stride_tn, r.shape[1] // ALIGN),
                ALIGN=ALIGN,
                BLOCK_M=BLOCK_M,
                num_warps=num_warps,
            )
    return error


def feature_backward(student: Sequence[Tensor], teachers: Sequence[Tensor], grad_error: Tensor) -> list[Tensor]:
    """See `contract.Backend`; grad_error may have any strides."""
    grads = []
    with on_device_of(grad_error):
        for r, f, g in zip(student, teachers, grad_error.unbind(), strict=True):
            N, M = r.shape
            grad = torch.empty((N, M), dtype=r.dtype, device=r.device)
            grads.append(grad)
            if grad.numel() == 0:
                continue
            ALIGN = alignment([r, f])
            (stride_sn, stride_tn), _ = stride_units([r, f], ALIGN)
            BLOCK_N, BLOCK_M, num_warps = elementwise_launch(M, max(r.element_size(), f.element_size()))
            feature_bwd_kernel[(-(-N // BLOCK_N) * -(-M // BLOCK_M),)](
                *(r, f, g, grad, stride_sn, stride_tn, g.stride(0), N, M // ALIGN),
                ALIGN=ALIGN,
                BLOCK_N=BLOCK_N,
                BLOCK_M=BLOCK_M,
                num_warps=num_warps,
            )
    return grads
