"""The feature loss: error of each sample and teacher and the gradient, in one pass over both maps and one launch."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends.contract import FeatureLossResult
from ..backends.feature_maps import Strides, map_pair, new_gradients
from .launch_table import SUM_BLOCK, feature_launch
from .launcher import Launcher
from .layout import common_alignment, unspecialised
from .softmax import stride


@triton.jit
def sample_error(
    student, teacher, grad, coefficient,  # of one sample of one pair
    P, Q, stride_sp, stride_sq, stride_tp, stride_tq,
    WRITE_GRAD: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Sum of the squared differences; threads sum their own columns and reduce once per group of blocks.

    One float32 sum over thousands of blocks would round too often.
    """
    M = P * Q
    total = 0.0
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        if DENSE:
            s_at, t_at = m, m
        else:
            p, q = (m // Q).to(tl.int64), (m % Q).to(tl.int64)
            s_at, t_at = p * stride_sp + q * stride_sq, p * stride_tp + q * stride_tq
        s = tl.load(student + s_at, mask=m < M, other=0.0).to(tl.float32)
        difference = s - tl.load(teacher + t_at, mask=m < M, other=0.0).to(tl.float32)
        squares += difference * difference
        if WRITE_GRAD:
            out = tl.where(coefficient == 0, 0.0, coefficient * difference)
            tl.store(grad + m, out.to(grad.dtype.element_ty), mask=m < M)
        if (start // BLOCK_M) % 32 == 31:  # a group of 32
            total += tl.sum(squares, axis=0)
            squares = tl.zeros((BLOCK_M,), tl.float32)
    return total + tl.sum(squares, axis=0)


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
    if error.shape[1] == 0:
        return
    pairs = [map_pair(r, f) for r, f in zip(student, teachers, strict=True)]
    # As the kernel reads them: map_pair copies maps that no two strides describe.
    student, teachers = tuple(pair.student for pair in pairs), tuple(pair.teacher for pair in pairs)
    strides = None if weights is None else weights.stride()
    launch = _feature_launcher(
        error.shape[1],
        tuple([pair[2:] for pair in pairs]),
        tuple([(x.element_size(), x.data_ptr() % 16 == 0) for x in (*student, *teachers, *grads)]),
        strides,
        (isinstance(scale, Tensor), isinstance(grad_scale, Tensor)),
        len(grads) > 0,
    )
    launch(
        *(student, teachers, tuple(grads) if grads else student),
        *(error if weights is None else weights, error, _factor(scale), _factor(grad_scale)),
    )


def _factor(scale: float | Tensor) -> float | Tensor:
    return scale if isinstance(scale, Tensor) else float(scale)


@functools.lru_cache(maxsize=1024)
def _feature_launcher(
    N: int,
    pairs: tuple[tuple[int, int, Strides, Strides], ...],
    tensors: tuple[tuple[int, bool], ...],
    weights: tuple[int, int] | None,
    on_device: tuple[bool, bool],
    WRITE_GRAD: bool,
) -> Launcher:
    """
    Args:
        pairs: the last fields of K MapPairs.
        tensors: bytes per element and alignment to 16 bytes, of maps and gradients.
        weights: strides of the weights, if there are any.
        on_device: whether scale and grad_scale are tensors.
    """
    K = len(pairs)
    # Strides of the K students and of the K teachers.
    sides = [[student for _, _, student, _ in pairs], [teacher for _, _, _, teacher in pairs]]
    dense = all(P == student[2] == teacher[2] == 1 for P, _, student, teacher in pairs)
    # The stride of one sample is arbitrary.
    divided = [*(Q for _, Q, _, _ in pairs), *(strides[0] for side in sides for strides in side if N > 1)]
    ALIGN = common_alignment(all(aligned for _, aligned in tensors), divided) if dense else 1
    columns = [
        [P for P, _, _, _ in pairs],
        [Q // ALIGN for _, Q, _, _ in pairs],
        *([strides[0] // ALIGN for strides in side] for side in sides),
        *([strides[i] for strides in side] for side in sides for i in (1, 2)),
    ]
    BLOCK_M, num_warps = feature_launch(max(itemsize for itemsize, _ in tensors))
    constants = {
        "K": K,
        "HAS_WEIGHTS": weights is not None,
        "SCALE_ON_DEVICE": on_device[0],
        "GRAD_SCALE_ON_DEVICE": on_device[1],
        "WRITE_GRAD": WRITE_GRAD,
        "DENSE": dense,
        "ALIGN": ALIGN,
        "BLOCK_M": BLOCK_M,
    }
    numbers = (*map(unspecialised, columns), *(weights or (0, 0)), N)
    return Launcher(feature_kernel, K * N, numbers, constants, num_warps=num_warps)


@functools.lru_cache(maxsize=1024)
def _sum_launcher(N: int, items: int, weights: tuple[int, int], scale_on_device: bool) -> Launcher:
    constants = {"SCALE_ON_DEVICE": scale_on_device, "BLOCK": SUM_BLOCK}
    return Launcher(feature_sum_kernel, 1, (*weights, max(N, 1), items), constants)


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
    launch = _sum_launcher(error.shape[1], error.numel(), weights.stride(), isinstance(scale, Tensor))
    launch(error, weights, loss, _factor(scale))
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
