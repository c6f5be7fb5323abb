"""The mean over a batch: 1 / number of valid rows, and the sums over the rows times it.

Inside the launch of the rows if that is cheap, which `launch.batch_launch` decides: every program counts all labels
itself, and the last one to end adds up. Programs that share the count would have to wait for each other, and Triton
does not promise that all programs of a launch run at the same time, so the wait might never end. Otherwise by launches
of their own, or, for more than BATCH_ROWS rows, by PyTorch.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_table import BATCH_KERNEL
from .launcher import Launcher


@triton.jit
def inverse_count(target, N, ignore_index, BLOCK: tl.constexpr):
    """1 / number of the N labels that are not ignored, at least 1, counted by this program."""
    kept = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        y = tl.load(target + n, mask=n < N, other=0)
        kept += ((n < N) & (y != ignore_index)).to(tl.int32)
    return 1.0 / tl.maximum(tl.sum(kept, axis=0), 1).to(tl.float32)


@triton.jit
def gradient_scale(
    grad_scale, total_scale, others, target, N, ignore_index,
    SCALE_ON_DEVICE: tl.constexpr, INVERSE: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """The factors of the gradient and of the sums over the rows; a mean multiplies both by 1 / number of valid rows."""
    scale = grad_scale
    if SCALE_ON_DEVICE:
        scale = tl.load(grad_scale)
    if INVERSE == "here":
        factor = inverse_count(target, N, ignore_index, BLOCK_B)
        scale *= factor
    elif INVERSE == "before":
        factor = tl.load(others + 2)
        scale *= factor
    else:
        factor = total_scale
    return scale, factor


@triton.jit
def store_means(row_stats, loss, others, factor, N, BLOCK: tl.constexpr):
    """Sums of loss, hard and soft times `factor`. Threads sum columns of their own, then reduce; N fixes the order."""
    losses = tl.zeros((BLOCK,), tl.float32)
    hards, softs = losses, losses
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        # Other programs wrote them: from L2, which all share.
        losses += tl.load(row_stats + n, mask=n < N, other=0.0, cache_modifier=".cg")
        hards += tl.load(row_stats + tl.cast(N, tl.int64) + n, mask=n < N, other=0.0, cache_modifier=".cg")
        softs += tl.load(row_stats + 2 * tl.cast(N, tl.int64) + n, mask=n < N, other=0.0, cache_modifier=".cg")
    tl.store(loss, tl.sum(losses, axis=0) * factor)
    tl.store(others, tl.sum(hards, axis=0) * factor)
    tl.store(others + 1, tl.sum(softs, axis=0) * factor)
    tl.store(others + 2, factor)


@triton.jit
def add_up_as_last(row_stats, loss, others, factor, counter, N, BLOCK: tl.constexpr):
    """By every program at its end; the one that ends last stores the means and sets the counter back to 0."""
    # All threads of this program have written their rows before one of them releases them to other programs.
    tl.debug_barrier()
    ended = tl.atomic_add(counter, 1, sem="acq_rel")
    if ended == tl.num_programs(0) - 1:
        tl.debug_barrier()
        store_means(row_stats, loss, others, factor, N, BLOCK)
        tl.store(counter, 0)


@triton.jit(do_not_specialize=["N", "ignore_index"])
def batch_count_kernel(
    target,  # (N,) int64
    inverse,  # (1,) fp32
    N, ignore_index,
    BLOCK: tl.constexpr,
):  # fmt: skip
    tl.store(inverse, inverse_count(target, N, ignore_index, BLOCK))


@triton.jit(do_not_specialize=["N"])
def batch_mean_kernel(
    row_stats,  # its first rows (3, N): loss, hard, soft
    loss,  # () fp32
    others,  # (3,) fp32: hard, soft, inverse, of which the last is read
    N,
    BLOCK: tl.constexpr,
):  # fmt: skip
    store_means(row_stats, loss, others, tl.load(others + 2), N, BLOCK)


def count_rows(target: Tensor, ignore_index: int, inverse: Tensor) -> None:
    """inverse (1,) = 1 / number of labels that are not `ignore_index`, at least 1."""
    _count_launcher(target.shape[0], ignore_index)(target, inverse)


def add_up_rows(row_stats: Tensor, loss: Tensor, others: Tensor) -> None:
    """loss () and others (3,) = means of loss, hard and soft; others[2] holds 1 / number of valid rows."""
    _mean_launcher(row_stats.shape[1])(row_stats, loss, others)


def add_up_by_torch(row_stats: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """The same for any number of rows."""
    means = row_stats[:3].sum(1) * inverse
    return means[0].clone(), torch.cat([means[1:], inverse])


def count_by_torch(target: Tensor, ignore_index: int) -> Tensor:
    """(1,) fp32, the same for any number of labels."""
    return (target != ignore_index).sum().clamp(min=1).to(torch.float32).reciprocal().reshape(1)


@functools.lru_cache(maxsize=1024)
def _count_launcher(N: int, ignore_index: int) -> Launcher:
    BLOCK, num_warps = BATCH_KERNEL
    return Launcher(batch_count_kernel, 1, (N, ignore_index), {"BLOCK": BLOCK}, num_warps=num_warps)


@functools.lru_cache(maxsize=1024)
def _mean_launcher(N: int) -> Launcher:
    BLOCK, num_warps = BATCH_KERNEL
    return Launcher(batch_mean_kernel, 1, (N,), {"BLOCK": BLOCK}, num_warps=num_warps)
