"""From a row's sums to its numbers and gradient: the only place where the kernels read the Formula."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import triton
import triton.language as tl

from ..backends import contract

if TYPE_CHECKING:
    from ..losses.formula import Formula

# Rows of row_stats (3 + 3K, N).
LOSS, HARD, SOFT = tl.constexpr(contract.LOSS), tl.constexpr(contract.HARD), tl.constexpr(contract.SOFT)
PER_TEACHER = tl.constexpr(contract.PER_TEACHER)


class KernelFormula(NamedTuple):
    """The numbers of a Formula as one kernel argument, fp32 on the device."""

    temperature: float
    exp2_scale: float  # log2(e) / T
    hard_weight: float
    soft_weight: float


def kernel_formula(formula: Formula) -> KernelFormula:
    T, hard_weight, soft_weight = map(float, formula[:3])
    return KernelFormula(T, math.log2(math.e) / T, hard_weight, soft_weight)


def temperature_power(formula: Formula) -> int:
    """T if kernels get e^x from e^{x/T} by multiplications, else 0."""
    return int(formula.temperature) if formula.temperature in contract.TEMPERATURE_POWERS else 0


def weighting_kind(formula: Formula, K: int) -> str:
    """The kernels' WEIGHTING: a single teacher weighs 1 under every rule."""
    name = formula.weighting_name
    return "uniform" if K == 1 and name in ("confidence", "entropy") else name


@triton.jit
def loss_terms(hard, weighted_divergence, formula):
    """loss and soft of rows from hard and sum_k w_k KL_k; a term of weight 0 is 0 even if it is infinite."""
    soft = weighted_divergence * (formula.temperature * formula.temperature)
    hard_term = tl.where(formula.hard_weight == 0, 0.0, formula.hard_weight * hard)
    soft_term = tl.where(formula.soft_weight == 0, 0.0, formula.soft_weight * soft)
    return hard_term + soft_term, soft


@triton.jit
def grad_student_terms(hard_part, soft_part, formula):
    """d loss / d student from softmax(s) - onehot(y) and W q - sum_k w_k p_k."""
    return formula.soft_weight * formula.temperature * soft_part + formula.hard_weight * hard_part


@triton.jit
def store_stat(row_stats, row, N, n, value, kept, in_range):
    """row_stats[row, n] = value, 0 on ignored rows."""
    pointers = row_stats + row * tl.cast(N, tl.int64) + n
    tl.store(pointers, tl.where(kept, value, 0.0), mask=in_range)


@triton.jit
def store_teacher(row_stats, k, N, n, divergence, ce, kept, in_range, K: tl.constexpr):
    """KL_k and CE_k of rows n."""
    store_stat(row_stats, PER_TEACHER + k, N, n, divergence, kept, in_range)
    store_stat(row_stats, PER_TEACHER + K + k, N, n, ce, kept, in_range)


@triton.jit
def store_loss(row_stats, N, n, hard, divergence, weights, kept, inside, in_range, formula, K: tl.constexpr):
    """w_k, loss, hard and soft of rows n. Returns W = sum_k w_k."""
    weighted_divergence = tl.zeros_like(hard)
    weight_sum = tl.zeros_like(hard)
    for k in tl.static_range(K):
        store_stat(row_stats, PER_TEACHER + 2 * K + k, N, n, weights[k], kept, in_range)
        weighted_divergence += tl.where(weights[k] == 0, 0.0, weights[k] * divergence[k])
        weight_sum += weights[k]
    loss, soft = loss_terms(hard, weighted_divergence, formula)
    store_stat(row_stats, LOSS, N, n, tl.where(inside, loss, float("nan")), kept, in_range)
    store_stat(row_stats, HARD, N, n, hard, kept, in_range)
    store_stat(row_stats, SOFT, N, n, soft, kept, in_range)
    return weight_sum
