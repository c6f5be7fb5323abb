"""The linear loss as registered operators with their gradients: one path in eager mode and under torch.compile.

Gradients of "mean" and "sum" are computed with the loss, because the logits exist only then; backward multiplies them
by its own, for float16 products also by the factor of the sum: gradients of the logits that are divided by the number
of tokens already would underflow, whatever a GradScaler multiplies by afterwards. For a loss per row the factors are
not known before backward, which computes the chunks a second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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

# A LinearCall in types that a schema has.
_CALL = (
    "Tensor hidden, Tensor head, Tensor? bias, Tensor[] teacher_hidden, Tensor[] teacher_heads, "
    "Tensor?[] teacher_biases, Tensor labels, int vocab_size, float[] constants, str weighting, str divergence, "
    "int ignore_index, Tensor? weights, ScalarType? inputs, ScalarType? logits, int? chunk_rows, "
    "float max_chunk_bytes, int? num_valid, str? group, int first_class, bool reduce_input_grad, str backend, "
    "bool[] needs"
)
_CALL_LENGTH, _NEEDS = 23, 22

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


def _arguments(call: LinearCall) -> tuple[Any, ...]:
    needs = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in call.student]
    weighting, shard = call.formula.weighting, call.shard
    return (
        *call.student,
        *([getattr(side, name) for side in call.teachers] for name in Side._fields),
        *(call.labels, call.vocab_size, *call.formula.constants()),
        weighting if isinstance(weighting, Tensor) else None,
        *(call.inputs, call.logits, call.chunk_rows, call.max_chunk_bytes, call.num_valid),
        *((None, 0, False) if shard is None else (shard.group_name, shard.start, shard.reduce_input_grad)),
        *(call.backend, needs),
    )


def _call_of(arguments: Sequence[Any]) -> LinearChunks:
    hidden, head, bias, hiddens, heads, biases, labels, vocab_size = arguments[:8]
    constants, weighting, divergence, ignore_index = arguments[8:12]
    weights, inputs, logits, chunk_rows, max_chunk_bytes, num_valid, *of_shard, backend, needs = arguments[12:]
    group, start, reduces = of_shard
    shard = None if group is None else VocabularyShard(group, start, start + vocab_size, reduces)
    teachers = [Side(*of) for of in zip(hiddens, heads, biases, strict=True)]
    formula = Formula.from_constants(constants, weighting, divergence, ignore_index, weights)
    call = LinearCall(
        Side(hidden, head, bias), teachers, labels, vocab_size, formula, inputs, logits, chunk_rows, max_chunk_bytes,
        num_valid, shard, backend,
    )  # fmt: skip
    if labels.is_cpu:
        checks.count_labels(labels, call.classes, ignore_index)
    return LinearChunks(call, tuple(needs))


def _results(gradients: LinearGradients, like: Tensor) -> tuple[Tensor, ...]:
    """An operator returns tensors: an empty one where there is no gradient."""
    return tuple(like.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _loss(*arguments: Any) -> tuple[Tensor, ...]:
    *call, number, on_device = arguments
    factor = number if on_device is None else on_device
    stats, gradients = _call_of(call).run(1.0 if _scales_in_backward(call) else factor)
    return ((stats[LOSS].sum() * factor).reshape(()), stats, *_results(gradients, stats))


def _scales_in_backward(call: Sequence[Any]) -> bool:
    """Whether backward multiplies the gradients by the factor of the sum."""
    return not can_divide_in_kernel(_product_dtype(call))


def _product_dtype(call: Sequence[Any]) -> torch.dtype:
    hidden, inputs = call[0], call[13]
    return inputs or hidden.dtype


def _rows(*arguments: Any) -> tuple[Tensor, Tensor]:
    stats, _ = _call_of([*arguments[:_NEEDS], [False] * 3]).run(1.0)
    return stats[LOSS].clone(), stats


def _rows_backward(*arguments: Any) -> tuple[Tensor, ...]:
    *call, factors = arguments
    stats, gradients = _call_of(call).run(factors.contiguous(), per_row=True)
    return _results(gradients, stats)


torch.library.impl("camkd_fast::linear_loss", "default", _loss)
torch.library.impl("camkd_fast::linear_loss_rows", "default", _rows)
torch.library.impl("camkd_fast::linear_loss_rows_backward", "default", _rows_backward)


def _fake_stats(call: Sequence[Any]) -> Tensor:
    hiddens, labels, dtype = call[3], call[6], accumulation_dtype(_product_dtype(call))
    constants, weighting, divergence, ignore_index = call[8:12]
    formula = Formula.from_constants(constants, weighting, divergence, ignore_index, None)
    count = row_stats_count(len(hiddens), formula.entropy)
    stats: Tensor = labels.new_empty((count, len(labels)), dtype=dtype)
    return stats


def _fake_gradients(call: Sequence[Any]) -> tuple[Tensor, ...]:
    stats, parameters = _fake_stats(call), call[:3]
    dtypes = call[0].dtype, stats.dtype, stats.dtype
    return tuple(
        parameter.new_empty(parameter.shape if needed else (0,), dtype=dtype if needed else stats.dtype)
        if parameter is not None
        else stats.new_empty(0)
        for parameter, needed, dtype in zip(parameters, call[_NEEDS], dtypes, strict=True)
    )


def _fake_loss(*arguments: Any) -> tuple[Tensor, ...]:
    call = arguments[:_CALL_LENGTH]
    stats = _fake_stats(call)
    return (stats.new_empty(()), stats, *_fake_gradients(call))


def _fake_rows(*arguments: Any) -> tuple[Tensor, Tensor]:
    stats = _fake_stats(arguments)
    return stats.new_empty(stats.shape[1]), stats


def _fake_rows_backward(*arguments: Any) -> tuple[Tensor, ...]:
    return _fake_gradients(arguments[:_CALL_LENGTH])


torch.library.register_fake("camkd_fast::linear_loss", _fake_loss)
torch.library.register_fake("camkd_fast::linear_loss_rows", _fake_rows)
torch.library.register_fake("camkd_fast::linear_loss_rows_backward", _fake_rows_backward)


# --- gradients -------------------------------------------------------------------------------------------------------


def _inputs_gradients(found: Sequence[Tensor | None], ctx: Any) -> tuple[Any, ...]:
    """Gradients of the arguments of an operator: those of the student, and None for all that follows.

    A list of tensors has a list of gradients; biases of which one is None are not such a list to torch.
    """
    nothing = [None] * ctx.K
    return (*found, nothing, nothing, nothing if ctx.all_biased else None, *(None,) * (ctx.count - 6))


def _keep_parameters(ctx: Any, inputs: Sequence[Any], *others: Tensor) -> None:
    """Saved, although the gradients are known: autograd then raises if one was changed in place meanwhile."""
    ctx.dtypes = [None if parameter is None else parameter.dtype for parameter in inputs[:3]]
    ctx.needs, ctx.K, ctx.count = inputs[_NEEDS], len(inputs[3]), len(inputs)
    ctx.set_materialize_grads(False)  # else the other outputs, as large as head and hidden states, get zeros
    ctx.all_biased = all(bias is not None for bias in inputs[5])
    save(ctx, *inputs[:3], *others)


def _setup_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *call, number, on_device = inputs
    late = _scales_in_backward(call)
    ctx.factor, ctx.backend = number if late and on_device is None else 1.0, call[_NEEDS - 1]
    _keep_parameters(ctx, inputs, *output[2:], on_device if late else None)
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
        rows = gradient.reshape(len(gradient), -1)
        out = rows if in_place else torch.empty_like(rows)
        return backend_for(backend, [rows]).scale_rows(rows, factor.reshape(1), out).view(gradient.shape)
    # By parts, because products of another dtype than the result's are stored before they are rounded
    result = torch.empty_like(gradient, dtype=dtype)
    rows = max(1, _PART_BYTES * len(gradient) // max(gradient.nbytes, 1))
    for first in range(0, len(gradient), rows):
        part = slice(first, first + rows)
        torch.mul(gradient[part], factor, out=result[part])
    return result


def _setup_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hiddens, heads, biases, labels, *rest = inputs[3:]
    ctx.biases = [bias is not None for bias in biases]
    given = [bias for bias in biases if bias is not None]
    weights = rest[5]
    ctx.has_weights, ctx.rest = weights is not None, rest
    rest[5] = None
    _keep_parameters(ctx, inputs, labels, *hiddens, *heads, *given, *([weights] if ctx.has_weights else []))
    ctx.mark_non_differentiable(output[1])


@first_order
def _backward_rows(ctx: Any, grad_losses: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad_losses is None:
        return _inputs_gradients((None, None, None), ctx)
    hidden, head, bias, labels, *others = saved(ctx)
    hiddens, heads, others = others[: ctx.K], others[ctx.K : 2 * ctx.K], others[2 * ctx.K :]
    rest = list(ctx.rest)
    if ctx.has_weights:
        rest[5] = others.pop()
    given = iter(others)
    biases = [next(given) if has else None for has in ctx.biases]
    found = torch.ops.camkd_fast.linear_loss_rows_backward(
        hidden, head, bias, hiddens, heads, biases, labels, *rest, grad_losses
    )
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
    """factor * the sum of the rows' losses, differentiable by the student, and row_stats (4 + 3K, N)."""
    number, on_device = (1.0, factor) if isinstance(factor, Tensor) else (factor, None)
    loss, stats, *_ = torch.ops.camkd_fast.linear_loss(*_arguments(call), number, on_device)
    return loss, stats


def linear_loss_rows(call: LinearCall) -> tuple[Tensor, Tensor]:
    """The losses (N,) of single rows, differentiable likewise, and row_stats."""
    losses, stats = torch.ops.camkd_fast.linear_loss_rows(*_arguments(call))
    return losses, stats
