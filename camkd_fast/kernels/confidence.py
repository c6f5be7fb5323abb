"""Confidence weights of K sets of logits, and the gradient through them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends.contract import DEBUG, SecondLabels, second_pair
from .batch_mean import count_by_torch, count_rows
from .launch_table import BATCH_ROWS, access_width, confidence_launch, elementwise_launch
from .launcher import Launcher
from .layout import Layout, alignment, layouts, row_shape, stride_units, unspecialised
from .softmax import (
    LOG2E,
    LOWEST,
    label_shares,
    lane_max,
    load_labels,
    loaded_label_distance,
    row_offset,
    stride,
    weights_from_scores,
)


@triton.jit(do_not_specialize=["N", "S", "C_units", "ignore_index"])
def confidence_fwd_kernel(
    logits,  # K pointers to (N, C)
    target, second_target, mix,  # (N,) int64, and int64 and fp32 or None
    weights, ce, lse,  # (K, N) fp32 each
    stride_zo, stride_zi,  # K each, `unspecialised`
    N, S, C_units,
    ignore_index,
    K: tl.constexpr,
    TWO_LEVEL: tl.constexpr,
    ALIGN: tl.constexpr,
    DEBUG: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    VEC: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows per program, one set of logits after the other, in steps of BLOCK_C columns and lanes of VEC."""
    R: tl.constexpr = BLOCK_C // VEC
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_range = n < N
    C = C_units * ALIGN
    TWO: tl.constexpr = second_target is not None
    labels, kept, valid = load_labels(target, second_target, mix, n, in_range, ignore_index, C, DEBUG)
    scores = ()
    for k in tl.static_range(K):
        row = logits[k] + row_offset(n, S, stride(stride_zo[k]), stride(stride_zi[k]), ALIGN, TWO_LEVEL)
        lane = tl.full((BLOCK_N, R), LOWEST, tl.float32)
        sums = tl.zeros((BLOCK_N, R), tl.float32)
        for start in range(0, C, BLOCK_C):
            cols = start + tl.arange(0, BLOCK_C)
            mask = kept[:, None] & (cols < C)[None, :]
            z = tl.load(row[:, None] + cols[None, :], mask=mask, other=float("-inf")).to(tl.float32)
            z = z.reshape(BLOCK_N, R, VEC)
            lane, drop = lane_max(lane, z)
            sums = sums * tl.exp2(drop * LOG2E) + tl.sum(tl.exp2((z - lane[:, :, None]) * LOG2E), axis=2)
        top = tl.max(lane, axis=1)
        log_sum = tl.log(tl.sum(sums * tl.exp2((lane - top[:, None]) * LOG2E), axis=1))
        score = log_sum - loaded_label_distance(row, top, labels, kept & valid, TWO)
        tl.store(ce + k * tl.cast(N, tl.int64) + n, tl.where(kept, score, 0.0), mask=in_range)
        tl.store(lse + k * tl.cast(N, tl.int64) + n, tl.where(kept, log_sum + top, 0.0), mask=in_range)
        scores += (score,)
    if K == 1:
        tl.store(weights + n, tl.where(kept, 1.0, 0.0), mask=in_range)
    else:
        w = weights_from_scores(scores, K, "confidence")
        for k in tl.static_range(K):
            tl.store(weights + k * tl.cast(N, tl.int64) + n, tl.where(kept, w[k], 0.0), mask=in_range)


@triton.jit(do_not_specialize=["stride_gk", "stride_gn", "N", "S", "C_units"])
def confidence_bwd_kernel(
    logits,  # K pointers to (N, C)
    target, second_target, mix,  # (N,) int64, and int64 and fp32 or None
    lse,  # (K, N) fp32, contiguous
    grad_ce,  # (K, N) fp32
    grads,  # K pointers to (N, C), contiguous
    stride_zo, stride_zi,  # K each, `unspecialised`
    stride_gk, stride_gn,
    N, S, C_units,
    K: tl.constexpr,
    TWO_LEVEL: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One (BLOCK_N, BLOCK_C) tile of all K gradients per program; rows without a gradient are not read."""
    C = C_units * ALIGN
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(C, BLOCK_C)
    n = (pid // blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = (pid % blocks).to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_range = n < N
    tile = in_range[:, None] & (cols < C)[None, :]
    # No label of a row with a gradient is -1.
    labels, _, _ = load_labels(target, second_target, mix, n, in_range, -1, C, False)
    y, second, share = labels
    TWO: tl.constexpr = second_target is not None
    for k in tl.static_range(K):
        g = tl.load(grad_ce + k * tl.cast(stride_gk, tl.int64) + n * stride_gn, mask=in_range, other=0.0)
        log_sum = tl.load(lse + k * tl.cast(N, tl.int64) + n, mask=in_range, other=0.0)
        row = logits[k] + row_offset(n, S, stride(stride_zo[k]), stride(stride_zi[k]), ALIGN, TWO_LEVEL)
        mask = tile & (g != 0)[:, None]
        z = tl.load(row[:, None] + cols[None, :], mask=mask, other=float("-inf")).to(tl.float32)
        p = tl.exp2((z - log_sum[:, None]) * LOG2E)
        out = g[:, None] * (p - label_shares(cols[None, :], (y[:, None], second[:, None], share[:, None]), TWO))
        out = tl.where((g == 0)[:, None], 0.0, out)
        pointers = grads[k] + n[:, None] * C + cols[None, :]
        tl.store(pointers, out.to(grads[k].dtype.element_ty), mask=tile)


def confidence_forward(
    logits: Sequence[Tensor],
    target: Tensor,
    ignore_index: int,
    inverse_valid: Tensor | None = None,
    second: SecondLabels | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `contract.Backend`. Labels outside [0, C) give NaN."""
    if inverse_valid is not None:
        if 0 < target.shape[0] <= BATCH_ROWS:
            count_rows(target, ignore_index, inverse_valid)
        else:
            inverse_valid.copy_(count_by_torch(target, ignore_index))
    K, N = len(logits), target.shape[0]
    weights, ce, lse = (torch.empty((K, N), dtype=torch.float32, device=target.device) for _ in range(3))
    if N > 0:
        launch = _forward_launcher(layouts(logits), ignore_index, second is not None)
        launch(tuple(logits), target, *second_pair(second), weights, ce, lse)
    return weights, ce, lse


def confidence_backward(
    logits: Sequence[Tensor],
    target: Tensor,
    lse: Tensor,
    grad_ce: Tensor,
    second: SecondLabels | None = None,
) -> list[Tensor]:
    """See `contract.Backend`."""
    N, C = target.shape[0], logits[0].shape[-1]
    grads = [torch.empty((N, C), dtype=z.dtype, device=z.device) for z in logits]
    if N > 0:
        launch = _backward_launcher(layouts(logits), grad_ce.stride())
        launch(tuple(logits), target, *second_pair(second), lse.contiguous(), grad_ce, tuple(grads))
    return grads


@functools.lru_cache(maxsize=1024)
def _forward_launcher(logits: tuple[Any, ...], ignore_index: int, two_labels: bool) -> Launcher:
    logits = tuple(Layout(*z) for z in logits)
    N, S, C = row_shape(logits[0].shape)
    ALIGN = alignment(logits)
    itemsize = max(z.dtype.itemsize for z in logits)
    BLOCK_N, BLOCK_C, num_warps, maxnreg = confidence_launch(len(logits), C, itemsize, ALIGN, two_labels)
    constants = {
        "K": len(logits),
        "TWO_LEVEL": len(logits[0].shape) == 3,
        "ALIGN": ALIGN,
        "DEBUG": DEBUG,
        "BLOCK_N": BLOCK_N,
        "BLOCK_C": BLOCK_C,
        "VEC": access_width(itemsize, ALIGN),
    }
    numbers = (*map(unspecialised, stride_units(logits, ALIGN)), N, S, C // ALIGN, ignore_index)
    options = {"num_warps": num_warps, "maxnreg": maxnreg, "debug": DEBUG}
    return Launcher(confidence_fwd_kernel, -(-N // BLOCK_N), numbers, constants, **options)


@functools.lru_cache(maxsize=1024)
def _backward_launcher(logits: tuple[Any, ...], grad_ce_strides: tuple[int, int]) -> Launcher:
    logits = tuple(Layout(*z) for z in logits)
    N, S, C = row_shape(logits[0].shape)
    ALIGN = alignment(logits)
    BLOCK_N, BLOCK_C, num_warps = elementwise_launch(C, max(z.dtype.itemsize for z in logits))
    constants = {
        "K": len(logits),
        "TWO_LEVEL": len(logits[0].shape) == 3,
        "ALIGN": ALIGN,
        "BLOCK_N": BLOCK_N,
        "BLOCK_C": BLOCK_C,
    }
    numbers = (*map(unspecialised, stride_units(logits, ALIGN)), *grad_ce_strides, N, S, C // ALIGN)
    grid = -(-N // BLOCK_N) * -(-C // BLOCK_C)
    return Launcher(confidence_bwd_kernel, grid, numbers, constants, num_warps=num_warps)
