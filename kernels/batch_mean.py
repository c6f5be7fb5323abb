"""The mean over a batch: the number of valid rows and their sums, one launch each. In PyTorch it takes eight."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kept import Launch
from .launch import BATCH_ROWS, batch_launch


@triton.jit(do_not_specialize=["scale", "N", "ignore_index"])
def batch_scale_kernel(
    target,  # (N,) int64
    scale,  # fp32 number, or pointer to one when SCALE_ON_DEVICE
    out,  # (2,) fp32: scale / valid rows, 1 / valid rows
    N, ignore_index,
    SCALE_ON_DEVICE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    kept = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        y = tl.load(target + n, mask=n < N, other=0)
        kept += ((n < N) & (y != ignore_index)).to(tl.int32)
    inverse = 1.0 / tl.maximum(tl.sum(kept, axis=0), 1).to(tl.float32)
    if SCALE_ON_DEVICE:
        scale = tl.load(scale)
    tl.store(out, inverse * scale)
    tl.store(out + 1, inverse)


@triton.jit(do_not_specialize=["N"])
def batch_mean_kernel(
    row_stats,  # its first rows (3, N): loss, hard, soft
    inverse,  # (1,) fp32
    loss,  # () fp32
    others,  # (3,) fp32: hard, soft, inverse
    N,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per row of row_stats; threads sum their own columns, then reduce once, in an order fixed by N."""
    i = tl.program_id(0)
    row = row_stats + i.to(tl.int64) * N
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        total += tl.load(row + n, mask=n < N, other=0.0)
    factor = tl.load(inverse)
    mean = tl.sum(total, axis=0) * factor
    if i == 0:
        tl.store(loss, mean)
        tl.store(others + 2, factor)
    else:
        tl.store(others + i - 1, mean)


def batch_scale(target: Tensor, ignore_index: int, scale: float | Tensor) -> Tensor:
    """(2,) fp32: scale / n and 1 / n, n being how many labels are not `ignore_index`, at least 1."""
    N = target.numel()
    if N > BATCH_ROWS:
        inverse = (target != ignore_index).sum().clamp(min=1).to(torch.float32).reciprocal().reshape(1)
        return torch.cat([inverse * scale, inverse])
    out = torch.empty(2, dtype=torch.float32, device=target.device)
    _scale_launch(N, ignore_index, isinstance(scale, Tensor))(target, scale, out)
    return out


def batch_mean(row_stats: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of loss, hard and soft times `inverse`: loss (), and (3,) hard, soft, `inverse`."""
    N = row_stats.shape[1]
    if N > BATCH_ROWS:
        means = row_stats[:3].sum(1) * inverse
        return means[0].clone(), torch.cat([means[1:], inverse])
    # Separate memory, since a caller may write to the loss.
    loss = torch.empty((), dtype=torch.float32, device=row_stats.device)
    others = torch.empty(3, dtype=torch.float32, device=row_stats.device)
    _mean_launch(N)(row_stats, inverse, loss, others)
    return loss, others


@functools.lru_cache(maxsize=1024)
def _scale_launch(N: int, ignore_index: int, scale_on_device: bool) -> Launch:
    BLOCK_N, num_warps = batch_launch(N)
    constants = {"SCALE_ON_DEVICE": scale_on_device, "BLOCK_N": BLOCK_N}
    return Launch(batch_scale_kernel, 1, (N, ignore_index), constants, num_warps=num_warps)


@functools.lru_cache(maxsize=1024)
def _mean_launch(N: int) -> Launch:
    BLOCK_N, num_warps = batch_launch(N)
    return Launch(batch_mean_kernel, 3, (N,), {"BLOCK_N": BLOCK_N}, num_warps=num_warps)
