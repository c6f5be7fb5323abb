"""What every backend provides: nine functions with these signatures, and types for what the losses return.

Formulas, edge conventions and layouts are specified in `reference`; `dispatch` holds the list of backends.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..losses.formula import Formula

COMPILED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of every backend but the reference
MAX_TEACHERS = 16
TEMPERATURE_POWERS = (1, 2, 4)  # temperatures T at which kernels compute e^x as (e^{x/T})^T
# Device-side assertions on labels. One that fails stops the CUDA context, and they cost registers.
DEBUG = os.environ.get("CAMKD_FAST_DEBUG") == "1"

# Rows of `row_stats`: (3 + 3K, N), and one more for the student's entropies if the formula asks for them. From
# PER_TEACHER on, blocks of K rows. `compiled` asserts that csrc/contract.h has the same order.
LOSS, HARD, SOFT, PER_TEACHER = 0, 1, 2, 3
DIVERGENCE_BLOCK, TEACHER_CE_BLOCK, WEIGHT_BLOCK = 0, 1, 2

# The sums of a row of one model, (7, N), which processes that share its classes exchange: `row_sums` says of what.
# RowSums of csrc/contract.h, as `compiled` asserts.
MAX, SUM_T, SUM_1, CROSS, PLOGP, LABEL, CENTER = range(7)
ROW_SUMS = 7


def row_stats_count(K: int, entropy: bool = False) -> int:
    """Rows of `row_stats` for K teachers."""
    return PER_TEACHER + 3 * K + entropy


def new_row_outputs(
    student: Tensor, K: int, formula: Formula, needs_grad: bool, out: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Memory for the float32 row_stats and the gradient (N, C), which is `out` if there is one."""
    N, C, device = student.shape[:-1].numel(), student.shape[-1], student.device
    row_stats = torch.empty((row_stats_count(K, formula.entropy), N), dtype=torch.float32, device=device)
    if not needs_grad:
        return row_stats, None
    return row_stats, torch.empty((N, C), dtype=student.dtype, device=device) if out is None else out


def new_row_sums(whole: Tensor | None, K: int, target: Tensor) -> Tensor:
    """Memory (K + 1, ROW_SUMS, N) float32 for the sums over a shard, which begins as a copy of `whole` if given."""
    if whole is not None:
        return whole.clone(memory_format=torch.contiguous_format)
    return torch.empty((K + 1, ROW_SUMS, target.shape[0]), dtype=torch.float32, device=target.device)


@dataclass
class RowLossResult:
    """The numbers of N rows and K teachers before any reduction."""

    row_stats: Tensor  # (3 + 3K or 4 + 3K, N) in the accumulation dtype; the properties below are its rows
    grad_student: Tensor | None  # (N, C) in the student's dtype: d loss / d student * grad_scale
    sums: tuple[float, float, float] | None = None  # of loss, hard and soft, if the backend adds up on the host
    means: tuple[Tensor, Tensor] | None = None  # on request: loss (), and (3,) hard, soft, and the factor of the sums

    @property
    def divergence(self) -> Tensor:
        """(K, N): KL_k."""
        return self._per_teacher(DIVERGENCE_BLOCK)

    @property
    def teacher_ce(self) -> Tensor:
        """(K, N): CE_k."""
        return self._per_teacher(TEACHER_CE_BLOCK)

    @property
    def weights(self) -> Tensor:
        """(K, N): w_k."""
        return self._per_teacher(WEIGHT_BLOCK)

    @property
    def entropy(self) -> Tensor | None:
        """(N,): the student's, if the formula asks for it."""
        return self.row_stats[-1] if self.row_stats.shape[0] % 3 else None

    def _per_teacher(self, block: int) -> Tensor:
        K = (self.row_stats.shape[0] - PER_TEACHER) // 3
        return self.row_stats[PER_TEACHER + block * K : PER_TEACHER + (block + 1) * K]


class SecondLabels(NamedTuple):
    """A second label for every row, as Mixup and CutMix make them. See `reference` for the edges.

    Cross-entropies of the row are mix * CE(target) + (1 - mix) * CE(second target).
    """

    target: Tensor  # (N,) int64, contiguous
    mix: Tensor  # (N,) in [0, 1], contiguous, in the accumulation dtype: the share of the first label


def second_pair(second: SecondLabels | None) -> tuple[Tensor | None, Tensor | None]:
    """As two arguments."""
    return (None, None) if second is None else (second.target, second.mix)


class FeatureLossResult(NamedTuple):
    """The feature loss of N samples and K teachers, and its gradient if it was requested."""

    loss: Tensor  # (), in the accumulation dtype: scale * sum_n sum_k w_k error_k
    error: Tensor  # (K, N); 0 where the weight is 0 and the error is not finite
    grads: list[Tensor]  # d loss / d r_k * grad_scale in the student's shapes and dtype; empty if not requested
    buffer: Tensor | None  # (size,): the memory of all `grads`, if they are together


class Backend(Protocol):
    """A backend is a module with these functions.

    Logits are (N, C), or (B, S, C) with N = B * S if no single stride describes the rows; the column stride is 1 and
    row strides are arbitrary. Targets are (N,) int64, contiguous; with `second`, rows have two labels. Feature maps are
    K pairs (N, ...) of any layout, the student's of one dtype; their gradients have the strides of
    `feature_maps.gradient_strides`. Accumulation is float64 for float64 tensors, else float32. No input is written.
    """

    def row_loss(
        self,
        student: Tensor,
        teachers: Sequence[Tensor],
        target: Tensor,
        formula: Formula,
        *,
        needs_grad: bool,
        grad_scale: float | Tensor = 1.0,
        mean: bool = False,
        total_scale: float | None = None,
        second: SecondLabels | None = None,
        out: Tensor | None = None,
    ) -> RowLossResult:
        """The numbers of every row, and with `needs_grad` the gradient, in one pass.

        Args:
            student, teachers: logits of one shape; dtypes and strides may differ.
            formula: checked; a weighting tensor is (K, N) in the accumulation dtype.
            grad_scale: multiplies the gradient: a number, or a one-element tensor on the student's device.
            mean: also divide the gradient by the number of valid rows (those not ignored, at least 1), and return
                the means over them. Used if that number is on a device and reading it would synchronise.
            total_scale: a backend that can add up in its launch returns the sums of loss, hard and soft times this
                number as `means`; others leave that to the caller. Not with `mean`.
            out: memory for the gradient, (N, C) contiguous in the student's dtype; may be the student's own. New
                memory without it.
        """
        ...

    def scale_rows(self, grad: Tensor, factor: Tensor, out: Tensor) -> Tensor:
        """out = grad * factor, multiplied in the accumulation dtype; `out` may be `grad`.

        grad, out: (N, C) contiguous, one dtype. factor: (1,) or (N,) in the accumulation dtype.
        """
        ...

    def confidence_forward(
        self,
        logits: Sequence[Tensor],
        target: Tensor,
        ignore_index: int,
        inverse_valid: Tensor | None = None,
        second: SecondLabels | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Confidence weights w, cross-entropies CE and log-sum-exps at T = 1, each (K, N).

        Args:
            inverse_valid: (1,) in the accumulation dtype; receives 1 / number of valid rows (at least 1).
        """
        ...

    def confidence_backward(
        self,
        logits: Sequence[Tensor],
        target: Tensor,
        lse: Tensor,
        grad_ce: Tensor,
        second: SecondLabels | None = None,
    ) -> list[Tensor]:
        """d/dz_k = grad_ce_k * (softmax(z_k) - onehot(y)): K tensors (N, C) in the dtypes of the logits.

        With a second label, mix * onehot(y) + (1 - mix) * onehot(second y) in place of onehot(y).

        grad_ce: (K, N), the total d loss / d CE_k; rows where it is 0 give 0 and their logits are not read.
        """
        ...

    def feature_loss(
        self,
        student: Sequence[Tensor],
        teachers: Sequence[Tensor],
        weights: Tensor,
        *,
        needs_grad: bool,
        scale: float | Tensor = 1.0,
        grad_scale: float | Tensor = 1.0,
        together: bool = False,
    ) -> FeatureLossResult:
        """The weighted loss of all samples, and with `needs_grad` its gradient, in one pass over the maps.

        Args:
            weights: (K, N) in the accumulation dtype. A weight of 0 contributes 0 to loss and gradient, even if the
                maps are not finite.
            scale: multiplies loss and gradient: a number, or a one-element tensor on the maps' device.
            grad_scale: multiplies the gradient only; likewise.
            together: the gradients share one buffer, which one launch can scale.
        """
        ...

    def feature_forward(self, student: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
        """error (K, N): mean over the values of a sample of (F_k - r_k)^2."""
        ...

    def feature_backward(
        self, student: Sequence[Tensor], teachers: Sequence[Tensor], grad_error: Tensor
    ) -> list[Tensor]:
        """d loss / d r_k = grad_error_k * 2 (r_k - F_k) / M_k for samples of M_k values; 0 where grad_error is 0."""
        ...


class ShardBackend(Protocol):
    """A backend also computes rows of which it is given some of the columns; the others are in other processes.

    Logits, target and formula are as in `Backend`, but a label outside [0, C) is not here. Every backend has these
    functions, the reference's are in `row_sums`.
    """

    def row_sums(
        self,
        student: Tensor,
        teachers: Sequence[Tensor],
        target: Tensor,
        formula: Formula,
        whole: Tensor | None = None,
    ) -> Tensor:
        """Sums over these columns, (K + 1, 7, N) in the accumulation dtype, as `row_sums` says. Ignored rows: any.

        Args:
            whole: the sums of whole rows. Then those over the mixtures of jsd and skew are computed, `cross` and
                `center` of the teachers; the other ones are those of `whole`.
        """
        ...

    def row_results(
        self,
        student: Tensor,
        teachers: Sequence[Tensor],
        target: Tensor,
        formula: Formula,
        sums: Tensor,
        *,
        needs_grad: bool,
        grad_scale: float | Tensor = 1.0,
        out: Tensor | None = None,
    ) -> RowLossResult:
        """`Backend.row_loss` given the sums of whole rows: their numbers, and the gradient of these columns.

        A row that is not ignored and has no label (NaN) in the sums is invalid.
        """
        ...


class MinNormSolver(Protocol):
    """A backend for devices where launches cost also solves for AEKD's weights in one."""

    def min_norm(self, gram: Tensor, cap: float, steps: int, floor: float) -> Tensor:
        """The weights (K,) float64 of `losses.min_norm`, for 2 to 16 vectors and a cap above 1 / K."""
        ...


class LabelCounter(Protocol):
    """A backend for CPU tensors also counts labels."""

    def count_labels(
        self, target: Tensor, C: int, ignore_index: int, second: SecondLabels | None = None
    ) -> tuple[int, int | None]:
        """How many rows are not ignored before the first one with invalid labels, and the index of that one, if any."""
        ...
