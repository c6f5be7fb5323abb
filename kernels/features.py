"""The feature loss: error of each sample and teacher and the gradient, in one pass over both maps and one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends.contract import FeatureLossResult
from ..backends.feature_maps import MapPair, map_pair, new_gradients
from .launch import SUM_BLOCK, feature_launch
from .layout import common_alignment, on_device_of, unspecialised
from .softmax import stride


GROUP = tl.constexpr(32)  # blocks


@triton.jit
def sample_error(
    student, teacher, grad, coefficient,  # of one sample of one pair
    P, Q, stride_sp, stride_sq, stride_tp, stride_tq,
    WRITE_GRAD: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Sum of the squared differences; threads sum their own columns and reduce once, at the end.

    Blocks are summed in groups: one float32 sum of thousands of them would round too often.
    """
    M = P * Q
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for group in range(0, M, GROUP * BLOCK_M):
        part = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(group, group + tl.minimum(GROUP * BLOCK_M, M - group), BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)
            if DENSE:
                s_at, t_at = m, m
            else:
                p, q = (m // Q).to(tl.int64), (m % Q).to(tl.int64)
                s_at, t_at = p * stride_sp + q * stride_sq, p * stride_tp + q * stride_tq
            s = tl.load(student + s_at, mask=m < M, other=0.0).to(tl.float32)
            difference = s - tl.load(teacher + t_at, mask=m < M, other=0.0).to(tl.float32)
            part += difference * difference
            if WRITE_GRAD:
                out = tl.where(coefficient == 0, 0.0, coefficient * difference)
                tl.store(grad + m, out.to(grad.dtype.element_ty), mask=m < M)
        squares += part
    return tl.sum(squares, axis=0)


@triton.jit(do_not_specialize=["scale", "grad_scale", "stride_wk", "stride_wn", "N"])
def feature_kernel(
    student, teacher,  # K pointers each
    grads,  # K pointers to (N, P, Q) contiguous; those of the student without WRITE_GRAD
    weights,  # (K, N) fp32; not read without HAS_WEIGHTS
    error,  # (K, N) fp32
    scale, grad_scale,  # fp32 numbers, or pointers to one each when ..._ON_DEVICE
    P, Q,  # K each, `unspecialised`; Q in units of ALIGN
    stride_sn, stride_tn,  # K each, `unspecialised`, in units of ALIGN
    stride_sp, stride_sq, stride_tp, stride_tq,  # K each, `unspecialised`
    stride_wk, stride_wn,
    N,
    K: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    SCALE_ON_DEVICE: tl.constexpr,
    GRAD_SCALE_ON_DEVICE: tl.constexpr,
    WRITE_GRAD: tl.constexpr,
    DENSE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One sample of one pair per program."""
    n = (tl.program_id(0) % N).to(tl.int64)
    pair = tl.program_id(0) // N
    weight = 1.0
    if HAS_WEIGHTS:
        weight = tl.load(weights + pair.to(tl.int64) * stride_wk + n * stride_wn)
    if SCALE_ON_DEVICE:
        scale = tl.load(scale)
    if GRAD_SCALE_ON_DEVICE:
        grad_scale = tl.load(grad_scale)
    for k in tl.static_range(K):
        if pair == k:
            columns = stride(Q[k]) * ALIGN
            M = stride(P[k]) * columns
            squares = sample_error(
                student[k] + n * stride(stride_sn[k]) * ALIGN, teacher[k] + n * stride(stride_tn[k]) * ALIGN,
                grads[k] + n * M, weight * (scale * grad_scale) * (2.0 / tl.cast(M, tl.float32)),
                stride(P[k]), columns,
                stride(stride_sp[k]), stride(stride_sq[k]), stride(stride_tp[k]), stride(stride_tq[k]),
                WRITE_GRAD, DENSE, BLOCK_M,
            )  # fmt: skip
            mean = squares / tl.cast(M, tl.float32)
            finite = tl.abs(mean) < float("inf")
            tl.store(error + tl.program_id(0), tl.where((weight == 0) & (finite == 0), 0.0, mean))


@triton.jit(do_not_specialize=["scale", "stride_wk", "stride_wn", "N", "items"])
def feature_sum_kernel(
    error, weights,  # (K, N) fp32
    loss,  # () fp32
    scale,  # fp32 number, or pointer to one when SCALE_ON_DEVICE
    stride_wk, stride_wn,
    N, items,
    SCALE_ON_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program; threads sum their own items, then reduce once, in an order fixed by K N."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, items, BLOCK):
        i = start + tl.arange(0, BLOCK)
        at = (i // N).to(tl.int64) * stride_wk + (i % N).to(tl.int64) * stride_wn
        weight = tl.load(weights + at, mask=i < items, other=0.0)
        mean = tl.load(error + i, mask=i < items, other=0.0)
        total += tl.where(weight == 0, 0.0, weight * mean)
    if SCALE_ON_DEVICE:
        scale = tl.load(scale)
    tl.store(loss, tl.sum(total, axis=0) * scale)


def _launch(
    student: Sequence[Tensor],
    teachers: Sequence[Tensor],
    weights: Tensor | None,
    error: Tensor,
    grads: Sequence[Tensor],
    scale: float | Tensor = 1.0,
    grad_scale: float | Tensor = 1.0,
) -> None:
    K, N = error.shape
    if N == 0:
        return
    pairs = [map_pair(r, f) for r, f in zip(student, teachers, strict=True)]
    dense = all(pair.P == pair.student_strides[2] == pair.teacher_strides[2] == 1 for pair in pairs)
    ALIGN = _alignment(pairs, grads) if dense else 1
    columns = [
        [pair.P for pair in pairs],
        [pair.Q // ALIGN for pair in pairs],
        *([strides[0] // ALIGN for strides in side] for side in _sides(pairs)),
        *([strides[i] for strides in side] for side in _sides(pairs) for i in (1, 2)),
    ]
    BLOCK_M, num_warps = feature_launch(max(x.element_size() for x in (*student, *teachers)))
    with on_device_of(error):
        feature_kernel[(K * N,)](
            *(tuple(pair.student for pair in pairs), tuple(pair.teacher for pair in pairs)),
            tuple(grads) if grads else tuple(student),
            *(error if weights is None else weights, error, scale, grad_scale),
            *map(unspecialised, columns),
            *((0, 0) if weights is None else weights.stride()),
            N,
            K=K,
            HAS_WEIGHTS=weights is not None,
            SCALE_ON_DEVICE=isinstance(scale, Tensor),
            GRAD_SCALE_ON_DEVICE=isinstance(grad_scale, Tensor),
            WRITE_GRAD=len(grads) > 0,
            DENSE=dense,
            ALIGN=ALIGN,
            BLOCK_M=BLOCK_M,
            num_warps=num_warps,
        )


def _sides(pairs: Sequence[MapPair]) -> list[list[tuple[int, int, int]]]:
    """Strides of the K students and of the K teachers."""
    return [[pair.student_strides for pair in pairs], [pair.teacher_strides for pair in pairs]]


def _alignment(pairs: Sequence[MapPair], grads: Sequence[Tensor]) -> int:
    maps = [x for pair in pairs for x in (pair.student, pair.teacher)]
    several = maps[0].shape[0] > 1  # the stride of one sample is arbitrary
    strides = [strides[0] for side in _sides(pairs) for strides in side if several]
    return common_alignment([*maps, *grads], [*(pair.Q for pair in pairs), *strides])


def _new_errors(student: Sequence[Tensor]) -> Tensor:
    return torch.empty((len(student), student[0].shape[0]), dtype=torch.float32, device=student[0].device)


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
    """See `contract.Backend`."""
    error = _new_errors(student)
    loss = torch.empty((), dtype=torch.float32, device=error.device)
    grads, buffer = new_gradients(student, together) if needs_grad else ([], None)
    _launch(student, teachers, weights, error, grads, scale, grad_scale)
    with on_device_of(error):
        feature_sum_kernel[(1,)](
            *(error, weights, loss, scale, *weights.stride(), max(error.shape[1], 1), error.numel()),
            SCALE_ON_DEVICE=isinstance(scale, Tensor),
            BLOCK=SUM_BLOCK,
        )
    return FeatureLossResult(loss, error, grads, buffer)


def feature_forward(student: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """See `contract.Backend`."""
    error = _new_errors(student)
    _launch(student, teachers, None, error, ())
    return error


def feature_backward(student: Sequence[Tensor], teachers: Sequence[Tensor], grad_error: Tensor) -> list[Tensor]:
    """See `contract.Backend`; grad_error may have any strides."""
    grads, _ = new_gradients(student, together=False)
    _launch(student, teachers, grad_error, _new_errors(student), grads)
    return grads
