"""From a row's sums to its numbers and gradient: the only place where the kernels read the Formula."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import triton
import triton.language as tl

from ..backends import contract

if TYPE_CHECKING:
    from ..losses.formula import Formula, LogitMap

# Rows of row_stats (3 + 3K, N), or (4 + 3K, N) with the student's entropies.
LOSS, HARD, SOFT = tl.constexpr(contract.LOSS), tl.constexpr(contract.HARD), tl.constexpr(contract.SOFT)
PER_TEACHER, DIVERGENCE_BLOCK = tl.constexpr(contract.PER_TEACHER), tl.constexpr(contract.DIVERGENCE_BLOCK)
TEACHER_CE_BLOCK, WEIGHT_BLOCK = tl.constexpr(contract.TEACHER_CE_BLOCK), tl.constexpr(contract.WEIGHT_BLOCK)


class KernelMap(NamedTuple):
    """The numbers of a LogitMap: outer * tanh(inner * x) with a softcap, else inner * x."""

    inner: float
    outer: float


class KernelFormula(NamedTuple):
    """The numbers of a Formula as one kernel argument, fp32 on the device."""

    temperature: float
    exp2_scale: float  # log2(e) / T
    hard_weight: float
    soft_weight: float
    mixture_share: float  # of the teacher in the mixture of its divergence
    mixture_other: float  # of the student
    z_loss_weight: float
    maps: tuple[KernelMap, ...]  # of the student and K teachers; empty without any


def kernel_formula(formula: Formula, K: int) -> KernelFormula:
    T, hard_weight, soft_weight = map(float, formula[:3])
    share, z_loss_weight = float(formula.divergence_kind().mixture_share), float(formula.z_loss_weight)
    maps = tuple(_kernel_map(of) for of in _logit_maps(formula, K))
    return KernelFormula(T, math.log2(math.e) / T, hard_weight, soft_weight, share, 1.0 - share, z_loss_weight, maps)


def formula_constants(formula: Formula, K: int) -> dict[str, Any]:
    """What kernels are compiled for."""
    return {
        **sums_constants(formula, K),
        "SCALE_BY_T2": formula.scale_by_t2,
        "Z_LOSS": formula.z_loss_weight != 0.0,
    }


def sums_constants(formula: Formula, K: int) -> dict[str, Any]:
    """What kernels that only sum up rows are compiled for."""
    return {
        "WEIGHTING": _weighting_kind(formula, K),
        "T_POWER": _temperature_power(formula),
        "DIVERGENCE": formula.divergence_kind().kind,
        "ENTROPY": formula.entropy,
        # A letter per tensor: "c" softcap, "s" scale only, "-" neither
        "MAPS": "".join("c" if of.softcap else "s" if of.scale != 1.0 else "-" for of in _logit_maps(formula, K)),
    }


def _logit_maps(formula: Formula, K: int) -> list[LogitMap]:
    """Of the student and K teachers; none if all leave their logits as they are."""
    maps = [formula.student_map(), *(formula.teacher_map(k) for k in range(K))]
    return maps if any(of.softcap or of.scale != 1.0 for of in maps) else []


def _kernel_map(of: LogitMap) -> KernelMap:
    return KernelMap(of.scale / of.softcap, of.softcap) if of.softcap else KernelMap(of.scale, 1.0)


def _temperature_power(formula: Formula) -> int:
    """T if kernels get e^x from e^{x/T} by multiplications, else 0."""
    return int(formula.temperature) if formula.temperature in contract.TEMPERATURE_POWERS else 0


def _weighting_kind(formula: Formula, K: int) -> str:
    """The kernels' WEIGHTING: a single teacher weighs 1 under every rule."""
    name = formula.weighting_name()
    return "uniform" if K == 1 and name in ("confidence", "entropy") else name


@triton.jit
def loss_terms(hard, weighted_divergence, formula, SCALE_BY_T2: tl.constexpr):
    """loss and soft of rows from hard and sum_k w_k D_k; a term of weight 0 is 0 even if it is infinite."""
    soft = weighted_divergence
    if SCALE_BY_T2:
        soft = weighted_divergence * (formula.temperature * formula.temperature)
    hard_term = tl.where(formula.hard_weight == 0, 0.0, formula.hard_weight * hard)
    soft_term = tl.where(formula.soft_weight == 0, 0.0, formula.soft_weight * soft)
    return hard_term + soft_term, soft


@triton.jit
def grad_student_terms(
    softmax, shares, soft_part, lse, formula, SCALE_BY_T2: tl.constexpr, Z_LOSS: tl.constexpr
):  # fmt: skip
    """d loss / d student from softmax(s), the one-hot label and T d (sum_k w_k D_k) / d student; lse: log-sum-exps."""
    hard_part = softmax - shares
    # Nobody asks for it if the soft loss has weight 0, and it may not be finite.
    soft_part = tl.where(formula.soft_weight == 0, 0.0, soft_part)
    if SCALE_BY_T2:
        gradient = formula.soft_weight * formula.temperature * soft_part + formula.hard_weight * hard_part
    else:
        gradient = formula.soft_weight / formula.temperature * soft_part + formula.hard_weight * hard_part
    if Z_LOSS:
        gradient += 2.0 * formula.z_loss_weight * lse * softmax
    return gradient


@triton.jit
def store_stat(row_stats, row, N, n, value, kept, in_range):
    """row_stats[row, n] = value, 0 on ignored rows."""
    pointers = row_stats + row * tl.cast(N, tl.int64) + n
    tl.store(pointers, tl.where(kept, value, 0.0), mask=in_range)


@triton.jit
def store_teacher(row_stats, k, N, n, divergence, ce, kept, in_range, K: tl.constexpr):
    """D_k and CE_k of rows n."""
    store_stat(row_stats, PER_TEACHER + DIVERGENCE_BLOCK * K + k, N, n, divergence, kept, in_range)
    store_stat(row_stats, PER_TEACHER + TEACHER_CE_BLOCK * K + k, N, n, ce, kept, in_range)


@triton.jit
def store_entropy(row_stats, N, n, sumT, plogp, kept, in_range, formula, K: tl.constexpr):
    """The student's entropy from sum e^d and sum e^d dT, d = (s - max) / T."""
    entropy = tl.log(sumT) - plogp / (sumT * formula.temperature)
    store_stat(row_stats, PER_TEACHER + 3 * K, N, n, entropy, kept, in_range)


@triton.jit
def store_loss(
    row_stats, N, n, hard, lse, divergence, weights, kept, valid, in_range, formula,
    K: tl.constexpr, SCALE_BY_T2: tl.constexpr, Z_LOSS: tl.constexpr,
):  # fmt: skip
    """w_k, loss, hard and soft of rows n. Returns W = sum_k w_k."""
    weighted_divergence = tl.zeros_like(hard)
    weight_sum = tl.zeros_like(hard)
    for k in tl.static_range(K):
        store_stat(row_stats, PER_TEACHER + WEIGHT_BLOCK * K + k, N, n, weights[k], kept, in_range)
        weighted_divergence += tl.where(weights[k] == 0, 0.0, weights[k] * divergence[k])
        weight_sum += weights[k]
    loss, soft = loss_terms(hard, weighted_divergence, formula, SCALE_BY_T2)
    if Z_LOSS:
        loss += formula.z_loss_weight * lse * lse
    store_stat(row_stats, LOSS, N, n, tl.where(valid, loss, float("nan")), kept, in_range)
    store_stat(row_stats, HARD, N, n, hard, kept, in_range)
    store_stat(row_stats, SOFT, N, n, soft, kept, in_range)
    return weight_sum
