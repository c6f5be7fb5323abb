"""The linear loss, chunk by chunk: logits of some rows, the row op in their memory, and the products of its gradient.

Of N x C logits only a chunk exists at a time: K + 1 tensors (m, C), the student's of which becomes its gradient. With s
operations in a product of the student's head and t_k in one of teacher k, 3 s + sum_k t_k are needed, and no more are
done: logits once, and the gradients of hidden states and head from them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.contract import PER_TEACHER, row_stats_count
from ..backends.dispatch import backend_for, shard_backend_for
from ..backends.reference import accumulation_dtype
from .formula import Formula
from .linear_rows import RowGroup, chunks, row_groups, valid_rows
from .projection import Projection, default_logits_dtype
from .vocabulary import VocabularyShard


class Side(NamedTuple):
    """One model: its hidden states and its head, in the order of the logits' formula."""

    hidden: Tensor  # (N, H)
    head: Tensor  # (C, H)
    bias: Tensor | None  # (C,)


class LinearCall(NamedTuple):
    """Checked arguments, without gradients."""

    student: Side
    teachers: Sequence[Side]
    labels: Tensor  # (N,) int64
    vocab_size: int  # V: classes of every head from V on do not exist
    formula: Formula  # a weighting tensor is (K, N)
    products: torch.dtype | None  # of the matrix products under autocast; None: of the hidden states
    logits_dtype: torch.dtype | None  # of bfloat16 products; None: `default_logits_dtype`
    chunk_rows: int | None
    max_chunk_bytes: float
    num_valid: int | None
    shard: VocabularyShard | None  # if the heads have some of the classes; then V of them
    backend: str

    def classes(self) -> int:
        """Labels are below it; of a shard nobody here knows the number."""
        return self.vocab_size if self.shard is None else torch.iinfo(torch.int64).max


class LinearGradients(NamedTuple):
    """Gradients of the student's; None where none is required."""

    hidden: Tensor | None  # (N, H) in the dtype of the hidden states
    head: Tensor | None  # (C, H), as the bias in the accumulation dtype
    bias: Tensor | None  # (C,)


class LinearChunks:
    """One evaluation of a call."""

    def __init__(self, call: LinearCall, needs: Sequence[bool]) -> None:
        """
        Args:
            needs: whether hidden states, head and bias of the student get a gradient.
        """
        self.call, self.needs = call, needs
        self.K, self.V = len(call.teachers), call.vocab_size
        self.sides = [call.student, *call.teachers]
        self.dtypes = [self._logits_dtype(side) for side in self.sides]
        self.projections = [
            Projection(
                side.head[: self.V], None if side.bias is None else side.bias[: self.V], self._products(side), dtype
            )
            for side, dtype in zip(self.sides, self.dtypes, strict=True)
        ]
        self.on_gpu = call.labels.is_cuda
        self.rows, self.count = valid_rows(call.labels, call.formula.ignore_index, call.num_valid)
        # Rows that the caller's number lets in may be ignored ones, whose hidden states must not reach a product.
        self.masks = call.num_valid is not None

    def _products(self, side: Side) -> torch.dtype:
        return side.hidden.dtype if self.call.products is None else self.call.products

    def _logits_dtype(self, side: Side) -> torch.dtype:
        products = self._products(side)
        if products != torch.bfloat16:
            return torch.float64 if products == torch.float64 else torch.float32
        return default_logits_dtype(side.head) if self.call.logits_dtype is None else self.call.logits_dtype

    def run(self, factor: float | Tensor, per_row: bool = False) -> tuple[Tensor, LinearGradients]:
        """row_stats, ignored rows 0, and the gradients of sum(factor * loss). Outside autocast, which
        would round the products once more.

        Args:
            factor: a number, one element on the device, or with `per_row` (N,).
        """
        call, formula = self.call, self.call.formula
        N, dtype = len(call.labels), accumulation_dtype(self.dtypes[0])
        stats = torch.zeros((row_stats_count(self.K, formula.entropy), N), dtype=dtype, device=call.labels.device)
        self.gradients = self._new_gradients()
        self.first = True
        weights = formula.weighting if isinstance(formula.weighting, Tensor) else None
        groups = row_groups(self.rows, self.count, weights, self.K, may_read=call.num_valid is None)
        with torch.autocast(stats.device.type, enabled=False):
            for group in groups:
                self._run_group(group, stats, factor, per_row)
        of_hidden = self.gradients.hidden
        if call.shard is not None and call.shard.reduce_input_grad and of_hidden is not None:
            call.shard.all_reduce(of_hidden)
        if weights is not None:
            # A teacher of weight 0 is not part of the row, computed or not.
            per_teacher = stats[PER_TEACHER : PER_TEACHER + 2 * self.K].view(2, self.K, N)
            per_teacher.masked_fill_(weights == 0, 0.0)
        return stats, self.gradients

    def _new_gradients(self) -> LinearGradients:
        """Memory that the chunks fill, and zeros where none will write."""
        hidden, head, bias = self.call.student
        needs_hidden, needs_head, needs_bias = self.needs
        dtype, written = self.projections[0].accumulator, self.V if self.count else 0
        new_hidden = torch.empty_like if self.rows is None else torch.zeros_like
        totals = [
            torch.empty(parameter.shape, dtype=dtype, device=head.device) if needed and parameter is not None else None
            for parameter, needed in ((head, needs_head), (bias, needs_bias))
        ]
        for total in totals:
            if total is not None:
                total[written:] = 0.0
        return LinearGradients(
            new_hidden(hidden, memory_format=torch.contiguous_format) if needs_hidden else None, *totals
        )

    def _run_group(self, group: RowGroup, stats: Tensor, factor: float | Tensor, per_row: bool) -> None:
        used = [0, *(k + 1 for k in group.teachers)]
        sizes = [self.dtypes[i].itemsize * self.V for i in used]
        # Processes that share the classes need the same chunks, whatever the sizes of their shards are.
        most_bytes = self.call.max_chunk_bytes if self.call.shard is None else math.inf
        parts = chunks(
            group.size, sum(sizes), most_bytes, self.call.chunk_rows, self.call.student.hidden.shape[1], self.on_gpu
        )
        most = max((part.stop - part.start for part in parts), default=0)
        memory = [torch.empty((most, self.V), dtype=self.dtypes[i], device=stats.device) for i in used]
        own = self._stats_rows(group.teachers) if len(group.teachers) < self.K else None
        for part in parts:
            rows: slice | Tensor = part if group.rows is None else group.rows[part]
            buffers = [buffer[: part.stop - part.start] for buffer in memory]
            found = self._run_chunk(rows, group.teachers, buffers, factor, per_row)
            if own is not None:
                index = rows if isinstance(rows, Tensor) else torch.arange(part.start, part.stop, device=stats.device)
                stats[own.unsqueeze(-1), index] = found
            elif isinstance(rows, Tensor):
                stats.index_copy_(1, rows, found)
            else:
                stats[:, rows] = found

    def _stats_rows(self, teachers: Sequence[int]) -> Tensor:
        """The rows of row_stats that a formula of these teachers only fills, in its order."""
        per_teacher = [PER_TEACHER + i * self.K + k for i in range(3) for k in teachers]
        entropy = [row_stats_count(self.K)] if self.call.formula.entropy else []
        return torch.tensor([*range(PER_TEACHER), *per_teacher, *entropy], device=self.call.labels.device)

    def _run_chunk(
        self,
        rows: slice | Tensor,
        teachers: Sequence[int],
        buffers: Sequence[Tensor],
        factor: float | Tensor,
        per_row: bool,
    ) -> Tensor:
        """row_stats of these rows; adds to the gradients."""
        labels = _taken(self.call.labels, rows)
        ignored = (labels == self.call.formula.ignore_index).unsqueeze(-1) if self.masks else None
        used = [0, *(k + 1 for k in teachers)]
        inputs = []
        for i, buffer in zip(used, buffers, strict=True):
            taken = self.projections[i].rows(_taken(self.sides[i].hidden, rows))
            inputs.append(taken if ignored is None else taken.masked_fill(ignored, 0.0))
            self.projections[i].logits(inputs[-1], buffer)
        student, *others = buffers
        formula = self._formula_of(rows, teachers)
        others_of_call = [x for x in (labels, formula.weighting, factor) if isinstance(x, Tensor)]
        backend = backend_for(self.call.backend, buffers, others_of_call)
        row_loss = backend.row_loss
        if self.call.shard is not None:
            of_shard = shard_backend_for(self.call.backend, buffers, others_of_call)
            row_loss = functools.partial(self.call.shard.row_loss, of_shard)
        found = row_loss(
            student, others, labels, formula, needs_grad=any(self.needs), grad_scale=1.0 if per_row else factor,
            out=student,
        )  # fmt: skip
        if any(self.needs):
            if per_row:
                assert isinstance(factor, Tensor)
                backend.scale_rows(student, _taken(factor, rows), student)
            self._add_gradients(student, inputs[0], rows)
        return found.row_stats

    def _formula_of(self, rows: slice | Tensor, teachers: Sequence[int]) -> Formula:
        """The formula of these rows and teachers."""
        formula = self.call.formula
        if isinstance(formula.weighting, Tensor):
            weights = formula.weighting[list(teachers)] if len(teachers) < self.K else formula.weighting
            formula = formula.replaced(weighting=weights[:, rows])
        if len(teachers) == self.K:
            return formula
        scales, softcaps = formula.teacher_logit_scales, formula.teacher_softcaps
        return formula.replaced(
            teacher_logit_scales=None if scales is None else tuple(scales[k] for k in teachers),
            teacher_softcaps=None if softcaps is None else tuple(softcaps[k] for k in teachers),
        )

    def _add_gradients(self, grad: Tensor, inputs: Tensor, rows: slice | Tensor) -> None:
        """The products of the gradient (m, V) of the student's logits."""
        projection, total = self.projections[0], self.gradients
        of_products = projection.as_input(grad) if total.hidden is not None or total.head is not None else grad
        if total.hidden is not None:
            found = projection.grad_rows(of_products).to(total.hidden.dtype)
            if isinstance(rows, Tensor):
                total.hidden.index_copy_(0, rows, found)
            else:
                total.hidden[rows] = found
        if total.head is not None:
            projection.add_grad_head(of_products, inputs, total.head[: self.V], self.first)
        if total.bias is not None:
            sums, bias = grad.sum(0, dtype=total.bias.dtype), total.bias[: self.V]
            bias.copy_(sums) if self.first else bias.add_(sums)
        self.first = False


def _taken(tensor: Tensor, rows: slice | Tensor) -> Tensor:
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)
