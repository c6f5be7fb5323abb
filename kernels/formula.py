"""The constants of the loss inside the kernels: the only place that reads a Formula, and what they combine to."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import triton
import triton.language as tl

from ..backends.contract import TEMPERATURE_POWERS

if TYPE_CHECKING:
    from ..losses.formula import Formula


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
    return int(formula.temperature) if formula.temperature in TEMPERATURE_POWERS else 0


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
