"""The linear loss as registered operators with their gradients: one path in eager mode and under torch.compile.

Gradients of "mean" and "sum" are computed with the loss, because the logits exist only then; backward multiplies them
by its own, for float16 products also by the factor of the sum: gradients of the logits that are divided by the number
of tokens already would underflow, whatever a GradScaler multiplies by afterwards. For a loss per row the factors are
not known before backward, which computes the chunks a second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.contract import LOSS, row_stats_count
from ..backends.dispatch import backend_for
from ..backends.memory import is_ordinary
from ..backends.reference import accumulation_dtype
from . import checks
from .autograd import first_order, is_one, keeps_graph, save, saved
from .formula import Formula
from .linear_chunks import LinearCall, LinearChunks, LinearGradients, Side
from .scale_plan import can_divide_in_kernel
from .vocabulary import VocabularyShard


class _Call(NamedTuple):
    """A LinearCall, in types that a schema has: the arguments of an operator, in its order."""

    hidden: Tensor
    head: Tensor
    bias: Tensor | None
    teacher_hidden: Sequence[Tensor]
    teacher_heads: Sequence[Tensor]
    teacher_biases: Sequence[Tensor | None]
    labels: Tensor
    vocab_size: int
    constants: Sequence[float]
    weighting: str
    divergence: str
    ignore_index: int
    weights: Tensor | None  # given ones
    products: torch.dtype | None
    logits_dtype: torch.dtype | None
    chunk_rows: int | None
    max_chunk_bytes: float
    num_valid: int | None
    group_name: str | None
    first_class: int
    reduce_input_grad: bool
    backend: str
    needs: Sequence[bool]  # whether hidden states, head and bias get a gradient

    def student(self) -> Side:
        return Side(self.hidden, self.head, self.bias)

    def product_dtype(self) -> torch.dtype:
        """What the student's products round to."""
        return self.products or self.hidden.dtype

    def scales_in_backward(self) -> bool:
        """Whether backward multiplies the gradients by the factor of the sum."""
        return not can_divide_in_kernel(self.product_dtype())


_LENGTH = len(_Call._fields)
# The types of these fields.
_CALL = (
    "Tensor hidden, Tensor head, Tensor? bias, Tensor[] teacher_hidden, Tensor[] teacher_heads, "
    "Tensor?[] teacher_biases, Tensor labels, int vocab_size, float[] constants, str weighting, str divergence, "
    "int ignore_index, Tensor? weights, ScalarType? products, ScalarType? logits_dtype, int? chunk_rows, "
    "float max_chunk_bytes, SymInt? num_valid, str? group_name, int first_class, bool reduce_input_grad, str backend, "
    "bool[] needs"
)
assert tuple(argument.split()[-1] for argument in _CALL.split(", ")) == _Call._fields

_PART_BYTES = 64 << 20  # of a gradient that is rounded

torch.library.define(
    "camkd_fast::linear_loss",
    f"({_CALL}, float factor, Tensor? factor_on_device)"
    " -> (Tensor loss, Tensor row_stats, Tensor grad_hidden, Tensor grad_head, Tensor grad_bias)",
)
torch.library.define("camkd_fast::linear_loss_rows", f"({_CALL}) -> (Tensor losses, Tensor row_stats)")
torch.library.define(
    "camkd_fast::linear_loss_rows_backward",
    f"({_CALL}, Tensor grad_losses) -> (Tensor grad_hidden, Tensor grad_head, Tensor grad_bias)",
)


def _arguments(call: LinearCall) -> _Call:
    student, shard = call.student, call.shard
    weights = call.formula.weighting
    constants, weighting, divergence, ignore_index = call.formula.constants()
    return _Call(
        hidden=student.hidden,
        head=student.head,
        bias=student.bias,
        teacher_hidden=[side.hidden for side in call.teachers],
        teacher_heads=[side.head for side in call.teachers],
        teacher_biases=[side.bias for side in call.teachers],
        labels=call.labels,
        vocab_size=call.vocab_size,
        constants=constants,
        weighting=weighting,
        divergence=divergence,
        ignore_index=ignore_index,
        weights=weights if isinstance(weights, Tensor) else None,
        products=call.products,
        logits_dtype=call.logits_dtype,
        chunk_rows=call.chunk_rows,
        max_chunk_bytes=call.max_chunk_bytes,
        num_valid=call.num_valid,
        group_name=None if shard is None else shard.group_name,
        first_class=0 if shard is None else shard.start,
        reduce_input_grad=shard is not None and shard.reduce_input_grad,
        backend=call.backend,
        needs=tuple(x is not None and x.requires_grad and torch.is_grad_enabled() for x in student),
    )


def _formula_of(of: _Call, weights: Tensor | None) -> Formula:
    return Formula.from_constants(of.constants, of.weighting, of.divergence, of.ignore_index, weights)


def _chunks_of(of: _Call) -> LinearChunks:
    shard = None
    if of.group_name is not None:
        shard = VocabularyShard(of.group_name, of.first_class, of.first_class + of.vocab_size, of.reduce_input_grad)
    teachers = [Side(*side) for side in zip(of.teacher_hidden, of.teacher_heads, of.teacher_biases, strict=True)]
    call = LinearCall(
        student=of.student(),
        teachers=teachers,
        labels=of.labels,
        vocab_size=of.vocab_size,
        formula=_formula_of(of, of.weights),
        products=of.products,
        logits_dtype=of.logits_dtype,
        chunk_rows=of.chunk_rows,
        max_chunk_bytes=of.max_chunk_bytes,
        num_valid=of.num_valid,
        shard=shard,
        backend=of.backend,
    )
    valid = checks.count_if_dense(of.labels, call.classes(), of.ignore_index)
    if valid is not None and of.num_valid is not None and valid > of.num_valid:
        raise ValueError(f"num_valid is {of.num_valid}, but {valid} rows count")
    return LinearChunks(call, of.needs)


def _results(gradients: LinearGradients, like: Tensor) -> tuple[Tensor, ...]:
    """An operator returns tensors: an empty one where there is no gradient."""
    return tuple(like.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _loss(*arguments: Any) -> tuple[Tensor, ...]:
    *rest, number, on_device = arguments
    call, factor = _Call(*rest), number if on_device is None else on_device
    stats, gradients = _chunks_of(call).run(1.0 if call.scales_in_backward() else factor)
    # Not a view, which may not be changed in place as part of a graph
    loss = stats[LOSS].sum() * (number if on_device is None else on_device.reshape(()))
    return (loss, stats, *_results(gradients, stats))


def _rows(*arguments: Any) -> tuple[Tensor, Tensor]:
    stats, _ = _chunks_of(_Call(*arguments)._replace(needs=(False, False, False))).run(1.0)
    return stats[LOSS].clone(), stats


def _rows_backward(*arguments: Any) -> tuple[Tensor, ...]:
    *rest, factors = arguments
    stats, gradients = _chunks_of(_Call(*rest)).run(factors.contiguous(), per_row=True)
    return _results(gradients, stats)


torch.library.impl("camkd_fast::linear_loss", "default", _loss)
torch.library.impl("camkd_fast::linear_loss_rows", "default", _rows)
torch.library.impl("camkd_fast::linear_loss_rows_backward", "default", _rows_backward)


def _fake_stats(call: _Call) -> Tensor:
    count = row_stats_count(len(call.teacher_hidden), _formula_of(call, None).entropy)
    return call.labels.new_empty((count, call.labels.shape[0]), dtype=accumulation_dtype(call.product_dtype()))


def _fake_gradients(call: _Call) -> tuple[Tensor, ...]:
    stats = _fake_stats(call)
    dtypes = call.hidden.dtype, stats.dtype, stats.dtype
    return tuple(
        parameter.new_empty(parameter.shape if needed else (0,), dtype=dtype if needed else stats.dtype)
        if parameter is not None
        else stats.new_empty(0)
        for parameter, needed, dtype in zip(call.student(), call.needs, dtypes, strict=True)
    )


def _fake_loss(*arguments: Any) -> tuple[Tensor, ...]:
    call = _Call(*arguments[:_LENGTH])
    stats = _fake_stats(call)
    return (stats.new_empty(()), stats, *_fake_gradients(call))


def _fake_rows(*arguments: Any) -> tuple[Tensor, Tensor]:
    stats = _fake_stats(_Call(*arguments))
    return stats.new_empty(stats.shape[1]), stats


def _fake_rows_backward(*arguments: Any) -> tuple[Tensor, ...]:
    return _fake_gradients(_Call(*arguments[:_LENGTH]))


torch.library.register_fake("camkd_fast::linear_loss", _fake_loss)
torch.library.register_fake("camkd_fast::linear_loss_rows", _fake_rows)
torch.library.register_fake("camkd_fast::linear_loss_rows_backward", _fake_rows_backward)


# --- gradients -------------------------------------------------------------------------------------------------------


def _inputs_gradients(found: Sequence[Tensor | None], ctx: Any) -> tuple[Any, ...]:
    """Gradients of the arguments of an operator: those of the student, and None for all that follows.

    A list of tensors has a list of gradients; biases of which one is None are not such a list to torch.
    """
    nothing = [None] * ctx.K
    after = ctx.count - len(found) - len(Side._fields)
    return (*found, nothing, nothing, nothing if ctx.all_biased else None, *(None,) * after)


def _keep_parameters(ctx: Any, call: _Call, count: int, *others: Tensor | None) -> None:
    """Saved, although the gradients are known: autograd then raises if one was changed in place meanwhile.

    `count`: arguments of the operator.
    """
    ctx.dtypes = [None if parameter is None else parameter.dtype for parameter in call.student()]
    ctx.needs, ctx.K, ctx.count, ctx.backend = call.needs, len(call.teacher_hidden), count, call.backend
    ctx.set_materialize_grads(False)  # else the other outputs, as large as head and hidden states, get zeros
    ctx.all_biased = all(bias is not None for bias in call.teacher_biases)
    save(ctx, *call.student(), *others)


def _setup_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *rest, number, on_device = inputs
    call = _Call(*rest)
    late = call.scales_in_backward()
    ctx.factor = number if late and on_device is None else 1.0
    _keep_parameters(ctx, call, len(inputs), *output[2:], on_device if late else None)
    ctx.mark_non_differentiable(*output[1:])


@first_order
def _backward_loss(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Any, ...]:
    if grad_loss is None:
        return _inputs_gradients((None, None, None), ctx)
    *gradients, on_device = saved(ctx)[3:]
    if ctx.factor != 1.0 or on_device is not None:
        grad_loss = grad_loss * (ctx.factor if on_device is None else on_device.reshape(()))
    found = [
        _times(gradient, grad_loss, dtype, ctx.backend) if needed and dtype is not None else None
        for gradient, needed, dtype in zip(gradients, ctx.needs, ctx.dtypes, strict=True)
    ]
    return _inputs_gradients(found, ctx)


def _times(gradient: Tensor, factor: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """gradient * factor in `dtype`; in place if nobody needs it again."""
    if not is_ordinary([gradient, factor]):
        return (gradient.to(factor.dtype) * factor).to(dtype)
    in_place = gradient.dtype == dtype and not keeps_graph()
    if is_one(factor):
        return gradient if in_place else gradient.to(dtype, copy=True)
    if gradient.dtype == dtype:
        # Not torch.mul, which on a GPU rounds the factor to the gradient's dtype: 65536 is infinite in float16
        rows = gradient.reshape(gradient.shape[0], gradient.shape[1:].numel())
        out = rows if in_place else torch.empty_like(rows)
        return backend_for(backend, [rows]).scale_rows(rows, factor.reshape(1), out).view(gradient.shape)
    # By parts, because products of another dtype than the result's are stored before they are rounded
    result = torch.empty_like(gradient, dtype=dtype)
    size = max(1, _PART_BYTES * len(gradient) // max(gradient.nbytes, 1))
    for first in range(0, len(gradient), size):
        part = slice(first, first + size)
        torch.mul(gradient[part], factor, out=result[part])
    return result


def _setup_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call = _Call(*inputs)
    _keep_parameters(
        ctx, call, len(inputs), call.labels, call.weights, *call.teacher_hidden, *call.teacher_heads,
        *call.teacher_biases,
    )  # fmt: skip
    nothing: Any = None
    ctx.call = call._replace(
        hidden=nothing, head=nothing, bias=None, labels=nothing, weights=None, teacher_hidden=[], teacher_heads=[],
        teacher_biases=[],
    )  # fmt: skip
    ctx.mark_non_differentiable(output[1])


@first_order
def _backward_rows(ctx: Any, grad_losses: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad_losses is None:
        return _inputs_gradients((None, None, None), ctx)
    K = ctx.K
    hidden, head, bias, labels, weights, *others = saved(ctx)
    call = ctx.call._replace(
        hidden=hidden, head=head, bias=bias, labels=labels, weights=weights, teacher_hidden=others[:K],
        teacher_heads=others[K : 2 * K], teacher_biases=others[2 * K :],
    )  # fmt: skip
    found = torch.ops.camkd_fast.linear_loss_rows_backward(*call, grad_losses)
    return _inputs_gradients(
        [
            gradient.to(dtype) if needed and dtype is not None else None
            for gradient, needed, dtype in zip(found, ctx.needs, ctx.dtypes, strict=True)
        ],
        ctx,
    )


torch.library.register_autograd("camkd_fast::linear_loss", _backward_loss, setup_context=_setup_loss)
torch.library.register_autograd("camkd_fast::linear_loss_rows", _backward_rows, setup_context=_setup_rows)


def linear_loss(call: LinearCall, factor: float | Tensor) -> tuple[Tensor, Tensor]:
    """factor * the sum of the rows' losses, differentiable by the student, and row_stats (`row_stats_count`, N)."""
    number, on_device = (1.0, factor) if isinstance(factor, Tensor) else (factor, None)
    loss, stats, *_ = torch.ops.camkd_fast.linear_loss(*_arguments(call), number, on_device)
    return loss, stats


def linear_loss_rows(call: LinearCall) -> tuple[Tensor, Tensor]:
    """The losses (N,) of single rows, differentiable likewise, and row_stats."""
    losses, stats = torch.ops.camkd_fast.linear_loss_rows(*_arguments(call))
    return losses, stats
