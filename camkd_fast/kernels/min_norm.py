"""`min_norm`: the interior-point method of `camkd_fast.losses.min_norm` in one launch. In PyTorch it takes some 800."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launcher import Launcher


@triton.jit
def min_norm_kernel(
    gram,  # (K, K) any floating dtype, contiguous
    weights,  # (K,) fp64
    K: tl.constexpr,
    CAP: tl.constexpr,
    STEPS: tl.constexpr,
    FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program. Rows and columns beyond K are those of the identity, and their unknowns stay 0."""
    i = tl.arange(0, BLOCK)
    inside = i < K
    diagonal = i[:, None] == i[None, :]
    there = inside[:, None] & inside[None, :]
    G = tl.load(gram + i[:, None] * K + i[None, :], mask=there, other=0.0).to(tl.float64)
    largest = tl.max(tl.sum(tl.where(diagonal, G, 0.0), axis=1), axis=0)
    G = G / tl.where(largest > 0, largest, 1.0)
    one = tl.full((BLOCK,), 1.0, tl.float64)
    zero = tl.zeros((BLOCK,), tl.float64)
    number = tl.full((), 1.0, tl.float64)  # tl.maximum would round a bare constant to fp32
    # Distances to the bounds w >= 0 and w <= cap, and their multipliers.
    low = one / K
    high = CAP - low
    dual_low, dual_high = one / low, one / high
    for _ in range(STEPS):
        products = tl.where(inside, low * dual_low + high * dual_high, 0.0)
        mu = tl.maximum(0.05 * (tl.sum(products, axis=0) / (2 * K)), number * FLOOR)
        ratio_low, ratio_high = dual_low / low, dual_high / high
        pull = mu / low - mu / high - tl.sum(G * tl.where(inside, low, 0.0)[None, :], axis=1)
        A = G + tl.where(diagonal, tl.where(inside, ratio_low + ratio_high, 1.0)[:, None], 0.0)
        step, unit = tl.where(inside, pull, 0.0), tl.where(inside, one, zero)
        # Gauss-Jordan without pivoting: A is symmetric and positive definite.
        for p in range(K):
            here = i == p
            row = tl.sum(tl.where(here[:, None], A, 0.0), axis=0)
            column = tl.sum(tl.where(here[None, :], A, 0.0), axis=1)
            pivot = tl.sum(tl.where(here, row, 0.0), axis=0)
            factor = tl.where(here, 0.0, column / pivot)
            step -= factor * tl.sum(tl.where(here, step, 0.0), axis=0)
            unit -= factor * tl.sum(tl.where(here, unit, 0.0), axis=0)
            A -= factor[:, None] * row[None, :]
        pivots = tl.sum(tl.where(diagonal, A, 0.0), axis=1)
        step, unit = step / pivots, unit / pivots
        # A NaN anywhere in G is in this sum, and so in every weight.
        d_low = step - unit * (tl.sum(step, axis=0) / tl.sum(unit, axis=0))
        d_dual_low = mu / low - dual_low - ratio_low * d_low
        d_dual_high = mu / high - dual_high + ratio_high * d_low
        reach = tl.maximum(-d_low / low, d_low / high)
        reach = tl.maximum(reach, tl.maximum(-d_dual_low / dual_low, -d_dual_high / dual_high))
        length = 0.99 / tl.maximum(tl.max(tl.where(inside, reach, 0.0), axis=0), number * 0.99)
        low, high = low + length * d_low, high - length * d_low
        dual_low, dual_high = dual_low + length * d_dual_low, dual_high + length * d_dual_high
    low = tl.where(inside, low, 0.0)
    tl.store(weights + i, low / tl.sum(low, axis=0), mask=inside)


def min_norm(gram: Tensor, cap: float, steps: int, floor: float) -> Tensor:
    """See `contract.MinNormSolver`."""
    K = gram.shape[0]
    gram = gram.contiguous()
    weights = torch.empty(K, dtype=torch.float64, device=gram.device)
    _launcher(K, cap, steps, floor)(gram, weights)
    return weights


@functools.lru_cache(maxsize=64)
def _launcher(K: int, cap: float, steps: int, floor: float) -> Launcher:
    BLOCK = max(triton.next_power_of_2(K), 2)
    constants = {"K": K, "CAP": cap, "STEPS": steps, "FLOOR": floor, "BLOCK": BLOCK}
    return Launcher(min_norm_kernel, 1, (), constants, num_warps=1)
