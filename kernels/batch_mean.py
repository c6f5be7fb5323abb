"""The mean over a batch: the number of valid rows and their sums, one launch each. In PyTorch it takes eight."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import batch_launch
from .layout import on_device_of


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
    if (launch := batch_launch(N)) is None:
        inverse = (target != ignore_index).sum().clamp(min=1).to(torch.float32).reciprocal().reshape(1)
        return torch.cat([inverse * scale, inverse])
    out = torch.empty(2, dtype=torch.float32, device=target.device)
    with on_device_of(target):
        batch_scale_kernel[(1,)](
            *(target, scale, out, N, ignore_index),
            SCALE_ON_DEVICE=isinstance(scale, Tensor),
            BLOCK_N=launch.BLOCK_N,
            num_warps=launch.num_warps,
        )
    return out


def batch_mean(row_stats: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of loss, hard and soft times `inverse`: loss (), and (3,) hard, soft, `inverse`."""
    N = row_stats.shape[1]
    if (launch := batch_launch(N)) is None:
        means = row_stats[:3].sum(1) * inverse
        return means[0].clone(), torch.cat([means[1:], inverse])
    loss = torch.empty(
        (), dtype=torch.float32, device=row_stats.device
    )  # separate memory, since a caller may write to it
    others = torch.empty(3, dtype=torch.float32, device=row_stats.device)
    with on_device_of(row_stats):
        batch_mean_kernel[(3,)](row_stats, inverse, loss, others, N, BLOCK_N=launch.BLOCK_N, num_warps=launch.num_warps)
    return loss, others
