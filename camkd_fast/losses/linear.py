"""The loss from hidden states and heads: camkd_linear_loss and CAMKDLinearLoss, for language models.

Logits of N tokens by C classes are never held: a chunk of them is computed, becomes the gradient in place, and is
multiplied back into the gradients of hidden states and head (`linear_chunks`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..backends.contract import HARD, SOFT, RowLossResult
from ..backends.reference import accumulation_dtype
from . import checks, linear_checks
from .formula import Formula, check_choice
from .linear_checks import autocast_enabled
from .linear_chunks import LinearCall, Side
from .linear_op import linear_loss, linear_loss_rows
from .scale_plan import inverse_divisor


class LinearLossOutput(NamedTuple):
    """The result of the linear loss, in the accumulation dtype. Only `loss` is differentiable.

    (...) is the target's shape, its last dimension one less with `shift`. Ignored rows are 0 in every row tensor.
    """

    loss: Tensor  # a scalar, or (...) for reduction="none"
    hard: Tensor | None  # cross-entropy of the student, reduced like `loss`; None if the target is a mask
    soft: Tensor  # sum_k w_k D_k, times T^2 if `scale_by_t2`, reduced like `loss`
    weights: Tensor  # (K, ...)
    teacher_ce: Tensor | None  # (K, ...) at temperature 1, 0 where a given weight is 0; None if the target is a mask
    divergence: Tensor  # (K, ...) D_k at temperature T, 0 where a given weight is 0
    entropy: Tensor | None  # (...) of the student at temperature T; None unless requested
    num_valid: Tensor  # () int64: rows that count


def camkd_linear_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Sequence[Tensor],
    teacher_heads: Sequence[Tensor],
    target: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_biases: Sequence[Tensor | None] | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scales: Sequence[float] | None = None,
    student_softcap: float | None = None,
    teacher_softcaps: Sequence[float | None] | None = None,
    temperature: float = 1.0,
    hard_weight: float = 0.0,
    soft_weight: float = 1.0,
    scale_by_t2: bool = True,
    weighting: str | Tensor = "confidence",
    divergence: str | tuple[str, float] = "forward_kl",
    reduction: str = "mean",
    ignore_index: int = -100,
    num_items: float | Tensor | None = None,
    num_valid: int | None = None,
    z_loss_weight: float = 0.0,
    shift: bool = False,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
    max_chunk_bytes: float = 1.6e9,
    logits_dtype: torch.dtype | None = None,
    entropy: bool = False,
    group: dist.ProcessGroup | None = None,
    vocab_range: tuple[int, int] | None = None,
    reduce_input_grad: bool = True,
    backend: str = "auto",
) -> LinearLossOutput:
    """The loss of `camkd_loss` for logits z = softcap * tanh(scale * (hidden @ head^T + bias) / softcap), not held.

    Memory beyond the inputs and their gradients is one chunk of K + 1 logits. The products that are needed are done
    once, in 3 s + sum_k t_k operations for s = 2 N C H of the student and t_k = 2 N C H_k of the teachers, and only for
    rows that count, and teachers that have a weight there.

    Args:
        student_hidden: (..., H).
        student_head: (C, H), the weight of nn.Linear, and `student_bias` (C,). Hidden states, head and bias of one
            model have one dtype (under autocast any), float32, bfloat16, float16 or float64; models may differ. The
            student's get gradients if they require them.
        teacher_hidden, teacher_heads, teacher_biases: of K teachers, 1 to 16: (..., H_k), (C_k, H_k) with C_k >= C, and
            (C_k,) or None. Without gradients.
        target: (...) int64 labels, or `ignore_index`; or bool, True for rows that count, if nothing needs labels.
        temperature, hard_weight, soft_weight, scale_by_t2, divergence, z_loss_weight: as in `camkd_loss`.
        student_logit_scale, student_softcap, teacher_logit_scales, teacher_softcaps: likewise.
        weighting: "confidence", "uniform", "entropy", "min_ce", or weights (K,) or (K, ...). Rows of one-hot weights
            route samples to teachers. A teacher of weight 0 is not computed there and may hold anything.
        reduction: "mean" over the rows that count, "sum", or "none", whose backward computes the logits again.
        num_items: divisor of "mean" instead of the number of rows (gradient accumulation, data parallel).
        num_valid: at least the number of rows that count, if known. Then nothing is read from a GPU, which would
            synchronise, and teachers of weight 0 are computed. A smaller number raises for CPU
            labels; on a GPU the rows beyond it are left out.
        shift: position i predicts target i + 1: (B, S, H) and (B, S), of which the first label is not used.
        vocab_size: classes that exist, if heads are padded; C without it. Nothing beyond it gets a gradient.
        chunk_rows: most rows of a chunk; the result depends on it by the order of sums only.
        max_chunk_bytes: of the logits of a chunk, if there is no `chunk_rows`; 512 rows on a GPU if that is more.
        logits_dtype: of the chunks for bfloat16 inputs: float32, or bfloat16, which halves their memory and rounds
            logits and their gradients to 2^-9. By default float32, but bfloat16 on a CPU with bfloat16 instructions,
            which return nothing else.
        entropy: whether the output has the student's `entropy`. With it, as with any formula but the paper's, a GPU
            takes the kernel that is not specialised to a number of teachers.
        group: the processes that share the classes, each with its rows of every head and bias. All of them pass the
            same hidden states, target, weights and settings, and get the same numbers. Gradients of head and bias are
            those of the own rows. A chunk has `chunk_rows`, or 2048 to 4096 rows on a GPU and 256 on a CPU.
        vocab_range: (start, stop), the classes of this process; heads may have more rows, which do not exist then.
            The ranges of the group are all classes from 0 on, each once. Without it every process has as many classes
            as its head, in the order of the ranks.
        reduce_input_grad: with a group, whether the gradient of the hidden states is added up over its processes;
            else it is that of the own classes, which the caller adds up (sequence parallelism).
        backend: of the row loss, as in `camkd_loss`.

    Returns:
        LinearLossOutput; its `loss` is differentiable once. The same call gives the same bits.

    Raises:
        ValueError, TypeError: an argument is invalid; both offending values are named.
        NotImplementedError: `backend` names a backend that cannot run these logits; or the call is in a torch.func
            transform, forward-mode differentiation or torch.jit.trace.
    """
    formula = Formula(
        temperature, hard_weight, soft_weight, weighting, ignore_index, divergence, scale_by_t2, z_loss_weight,
        student_logit_scale, student_softcap, teacher_logit_scales, teacher_softcaps, entropy,
    )  # fmt: skip
    linear_checks.check_mode()
    sides = linear_checks.checked_sides(
        student_hidden, student_head, student_bias, teacher_hidden, teacher_heads, teacher_biases, shift
    )
    V, shard = linear_checks.checked_vocabulary(sides, vocab_size, group, vocab_range, reduce_input_grad)
    linear_checks.check_settings(reduction, num_items, chunk_rows, max_chunk_bytes, num_valid, logits_dtype, backend)
    formula = formula.checked(len(sides) - 1)
    labels, formula, is_mask = linear_checks.checked_labels(target, sides[0].hidden, formula, shift)
    inputs = _autocast_dtype(student_hidden)
    lead, dtype = labels.shape, accumulation_dtype(inputs or student_hidden.dtype)
    weights = linear_checks.weights_as_rows(formula.weighting, len(sides) - 1, lead, shift, labels, dtype)
    flat = [Side(side.hidden.reshape(-1, side.hidden.shape[-1]), side.head, side.bias) for side in sides]
    call = LinearCall(
        student=flat[0], teachers=flat[1:], labels=labels.reshape(-1).contiguous(), vocab_size=V,
        formula=formula.replaced(weighting=weights), products=inputs, logits_dtype=logits_dtype, chunk_rows=chunk_rows,
        max_chunk_bytes=float(max_chunk_bytes), num_valid=num_valid, shard=shard, backend=backend,
    )  # fmt: skip
    factor = _factor(call, reduction, num_items, dtype)
    loss, stats = linear_loss_rows(call) if factor is None else linear_loss(call, factor)
    return _output(loss, stats, call, lead, factor, is_mask, shift)


def _factor(
    call: LinearCall, reduction: str, num_items: float | Tensor | None, dtype: torch.dtype
) -> float | Tensor | None:
    """Of the sums over the rows; None for results per row."""
    if reduction != "mean":
        return 1.0 if reduction == "sum" else None
    labels, ignore_index = call.labels, call.formula.ignore_index
    # A trace would keep the numbers, and be compiled again for each num_items
    if torch.compiler.is_compiling() and isinstance(num_items, (int, float)):
        num_items = torch.full((), num_items, dtype=dtype, device=labels.device)
    valid = checks.count_labels(labels, call.classes(), ignore_index) if checks.can_count(labels) else None
    return inverse_divisor(num_items, valid, labels, ignore_index, dtype)


def _autocast_dtype(hidden: Tensor) -> torch.dtype | None:
    enabled = autocast_enabled(hidden) and hidden.dtype != torch.float64
    return torch.get_autocast_dtype(hidden.device.type) if enabled else None


def _output(
    loss: Tensor,
    stats: Tensor,
    call: LinearCall,
    lead: torch.Size,
    factor: float | Tensor | None,
    is_mask: bool,
    shift: bool,
) -> LinearLossOutput:
    """`factor`: of the sums over the rows; None for results per row."""

    def of_rows(rows: Tensor) -> Tensor:
        rows = rows.detach().view((*rows.shape[:-1], *lead))  # `lead` may be ()
        return rows[..., :-1] if shift else rows

    def reduced(row: int) -> Tensor:
        return of_rows(stats[row]) if factor is None else (stats[row].detach().sum() * factor).reshape(())

    rows = RowLossResult(stats, None)
    return LinearLossOutput(
        loss=loss if factor is not None else (loss.view(lead)[..., :-1] if shift else loss.view(lead)),
        hard=None if is_mask else reduced(HARD),
        soft=reduced(SOFT),
        weights=of_rows(rows.weights),
        teacher_ce=None if is_mask else of_rows(rows.teacher_ce),
        divergence=of_rows(rows.divergence),
        entropy=None if rows.entropy is None else of_rows(rows.entropy),
        num_valid=(call.labels != call.formula.ignore_index).sum(),
    )


_CHECKED = inspect.signature(linear_checks.check_settings).parameters
_OF_A_BATCH = ("student_bias", "teacher_biases", "num_items", "num_valid", "group", "vocab_range")


@functools.cache
def _defaults() -> dict[str, Any]:
    """Of the settings, which are the keywords that do not belong to one batch."""
    parameters = inspect.signature(camkd_linear_loss).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in _OF_A_BATCH}


class CAMKDLinearLoss(nn.Module):
    """`camkd_linear_loss` as a module without parameters: its settings at construction, tensors in the call.

    Settings are attributes, which may be changed.

    >>> criterion = CAMKDLinearLoss(temperature=2.0, weighting="uniform")
    >>> criterion(student_hidden, student_head, teacher_hidden, teacher_heads, target).loss.backward()
    """

    def __init__(self, weighting: str = "confidence", **settings: Any) -> None:
        """
        Args:
            weighting: a name; a tensor is given with its batch.
            settings: other keywords of `camkd_linear_loss` but those of a batch, which are student_bias,
                teacher_biases, num_items, num_valid, group and vocab_range.

        Raises:
            ValueError, TypeError: naming the setting and its value.
        """
        super().__init__()
        for name in settings:
            check_choice("a setting of CAMKDLinearLoss", name, tuple(_defaults()))
        if not isinstance(weighting, str):
            raise TypeError(f"weighting must be a name, got {type(weighting).__name__}: a tensor is given in the call")
        Formula(weighting=weighting, **{name: settings[name] for name in settings if name in Formula._fields}).checked()
        linear_checks.check_settings(**{name: settings[name] for name in settings if name in _CHECKED})
        for name, value in (_defaults() | {"weighting": weighting, **settings}).items():
            setattr(self, name, value)

    def forward(
        self,
        student_hidden: Tensor,
        student_head: Tensor,
        teacher_hidden: Sequence[Tensor],
        teacher_heads: Sequence[Tensor],
        target: Tensor,
        *,
        student_bias: Tensor | None = None,
        teacher_biases: Sequence[Tensor | None] | None = None,
        weighting: Tensor | None = None,
        num_items: float | Tensor | None = None,
        num_valid: int | None = None,
        group: dist.ProcessGroup | None = None,
        vocab_range: tuple[int, int] | None = None,
    ) -> LinearLossOutput:
        """See `camkd_linear_loss`."""
        settings = self.settings if weighting is None else {**self.settings, "weighting": weighting}
        return camkd_linear_loss(
            *(student_hidden, student_head, teacher_hidden, teacher_heads, target),
            student_bias=student_bias,
            teacher_biases=teacher_biases,
            num_items=num_items,
            num_valid=num_valid,
            group=group,
            vocab_range=vocab_range,
            **settings,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """Those that differ from the defaults of `camkd_linear_loss`."""
        return {name: value for name, default in _defaults().items() if (value := getattr(self, name)) != default}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.settings.items())
