"""The feature loss by each of the three ways of `entry`, as in `confidence_op`.

The weights are known before the maps are read, so the kernel writes the gradient together with the loss and backward
only scales it. Not for float16, whose range 1 / (M N) of a gradient without a loss scale would leave, nor for a loss
per sample: their backward reads the maps again, with the incoming gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import reference
from ..backends.contract import FeatureLossResult, SecondLabels
from ..backends.dispatch import backend_for, first_of, whole_losses
from ..backends.feature_maps import gradient_strides
from ..backends.memory import is_ordinary, observer
from ..backends.reference import accumulation_dtype, feature_rows
from ..backends.whole_losses import WholeFeatureLoss
from .autograd import first_order, is_one, keeps_graph, needs_grad, savable, save, saved
from .entry import KERNEL, Way, way_of_call

# --- errors of each sample and teacher -------------------------------------------------------------------------------


def _feature_forward(student: Sequence[Tensor], teachers: Sequence[Tensor], backend: str) -> Tensor:
    """error (K, N): the mean squared difference of each sample and teacher."""
    return backend_for(backend, [*student, *teachers], maps=True).feature_forward(student, teachers)


def _feature_backward(
    student: Sequence[Tensor], teachers: Sequence[Tensor], grad_error: Tensor, backend: str
) -> list[Tensor]:
    module = backend_for(backend, [*student, *teachers], [grad_error], maps=True)
    return module.feature_backward(student, teachers, grad_error)


class _FeatureError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, teachers: Sequence[Tensor], *student: Tensor) -> Tensor:
        save(ctx, *student, *teachers)
        ctx.backend = backend
        return _feature_forward(student, teachers, backend)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_error: Tensor) -> tuple[Any, ...]:
        features = saved(ctx)
        K = len(features) // 2
        grads = _feature_backward(features[:K], features[K:], grad_error, ctx.backend)
        return None, None, *grads


_feature_op = torch.library.custom_op("camkd_fast::feature_error", _feature_forward, mutates_args=())
_feature_backward_op = torch.library.custom_op("camkd_fast::feature_error_backward", _feature_backward, mutates_args=())


@_feature_op.register_fake
def _(student: Sequence[Tensor], teachers: Sequence[Tensor], backend: str) -> Tensor:
    return _new_errors(student)


def _new_errors(student: Sequence[Tensor]) -> Tensor:
    dtype = accumulation_dtype(student[0].dtype)
    return student[0].new_empty((len(student), student[0].shape[0]), dtype=dtype)


def _new_gradients(student: Sequence[Tensor]) -> list[Tensor]:
    return [r.new_empty_strided(r.shape, gradient_strides(r)) for r in student]


@_feature_backward_op.register_fake
def _(student: Sequence[Tensor], teachers: Sequence[Tensor], grad_error: Tensor, backend: str) -> list[Tensor]:
    return _new_gradients(student)


def _feature_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    student, teachers, backend = inputs
    save(ctx, *student, *teachers)
    ctx.backend = backend


@first_order
def _feature_op_backward(ctx: Any, grad_error: Tensor) -> tuple[Any, ...]:
    features = saved(ctx)
    K = len(features) // 2
    return _feature_backward_op(features[:K], features[K:], grad_error, ctx.backend), [None] * K, None


_feature_op.register_autograd(_feature_op_backward, setup_context=_feature_setup)

# --- the loss --------------------------------------------------------------------------------------------------------


class FeatureCall(NamedTuple):
    """Checked arguments."""

    student: Sequence[Tensor]  # K maps (N, ...) of one dtype
    teachers: Sequence[Tensor]  # K maps, each of its student's shape
    weights: Tensor  # (K, N) in the accumulation dtype
    backend: str

    def _backend(self) -> Any:
        return backend_for(self.backend, [*self.student, *self.teachers], [self.weights], maps=True)


class _FeatureSum(torch.autograd.Function):
    """Attaches to a finished loss the gradient that the kernel has written; see the module."""

    @staticmethod
    def forward(ctx: Any, finished: WholeFeatureLoss, backend: str, weights: Tensor, *student: Tensor) -> Tensor:
        loss, error, buffer, ctx.layouts, ctx.scale = finished
        ctx.save_for_backward(buffer, error)
        ctx.backend, ctx.K = backend, len(student)
        return loss

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        buffer, error = ctx.saved_tensors
        retained = keeps_graph()
        whole, found = whole_losses(ctx.backend, grad_output, maps=True), None
        if whole is not None and observer() is None:
            found = whole.feature_gradients(buffer, error, grad_output, ctx.scale, retained)
        if found is not None:
            buffer, grad_weights = found
        else:
            grad_weights = None if error is None else error * (grad_output * ctx.scale)
        if buffer is None:
            return None, None, grad_weights, *[None] * ctx.K
        if found is None and not is_ordinary([grad_output]):  # a batch of gradients, or inside a trace
            grads = [buffer.as_strided(*layout) for layout in ctx.layouts]
            return None, None, grad_weights, *((g.to(grad_output.dtype) * grad_output).to(g.dtype) for g in grads)
        if found is None:
            buffer = _scaled(buffer, grad_output, retained, ctx.backend)
        return None, None, grad_weights, *(buffer.as_strided(*layout) for layout in ctx.layouts)


def _scaled(buffer: Tensor, factor: Tensor, retained: bool, backend: str) -> Tensor:
    """`buffer` times a scalar; in place unless the graph is retained, since it is freed with the buffer otherwise."""
    if not retained and is_one(factor):
        return buffer
    out = torch.empty_like(buffer) if retained else buffer
    return backend_for(backend, [buffer], maps=True).scale_rows(buffer, factor.reshape(1), out)


def feature_error(call: FeatureCall, way: Way) -> Tensor:
    """error (K, N) in the accumulation dtype; differentiable once with respect to the student."""
    student, teachers = call.student, call.teachers
    if way is Way.OPERATOR:
        error: Tensor = _feature_op(list(student), list(teachers), call.backend)
        return error
    if way is Way.EXPRESSION:
        return reference.feature_forward(student, [savable(f) for f in teachers])
    if not needs_grad(student):
        return _feature_forward(student, teachers, call.backend)
    result: Tensor = _FeatureError.apply(call.backend, teachers, *student)  # type: ignore[no-untyped-call]
    return result


def feature_loss_rows(call: FeatureCall, way: Way) -> Tensor:
    """(N,): sum_k w_k error_k; differentiable once."""
    return feature_rows(savable(call.weights), feature_error(call, way))


def feature_loss_sum(call: FeatureCall, scale: float | Tensor, way: Way) -> Tensor:
    """scale * sum_n sum_k w_k error_k, a scalar; differentiable once with respect to student and weights.

    Args:
        scale: a number, or (1,) in the accumulation dtype.
    """
    differentiable = needs_grad([*call.student, call.weights])
    if way is Way.KERNEL and not differentiable:
        loss: Tensor = call._backend().feature_loss(*call[:3], needs_grad=False, scale=scale).loss
        return loss
    if way is Way.KERNEL and call.student[0].dtype != torch.float16:
        with torch.no_grad():
            finished = _finished(call, scale)
        return _attached(finished, call.backend, call.weights, call.student)
    total = feature_loss_rows(call, way).sum()
    return total * scale.squeeze(0) if isinstance(scale, Tensor) else total * scale


def _finished(call: FeatureCall, scale: float | Tensor) -> WholeFeatureLoss:
    """The loss, and what the gradients of the inputs that require one need."""
    needs_student = any(r.requires_grad for r in call.student)
    result = call._backend().feature_loss(*call[:3], needs_grad=needs_student, scale=scale, together=True)
    layouts = [(grad.shape, grad.stride(), grad.storage_offset()) for grad in result.grads]
    buffer = None if result.buffer is None else result.buffer.view(1, -1)
    return WholeFeatureLoss(result.loss, result.error if call.weights.requires_grad else None, buffer, layouts, scale)


def _attached(finished: WholeFeatureLoss, backend: str, weights: Tensor, student: Sequence[Tensor]) -> Tensor:
    """The loss in the graph of the inputs."""
    loss: Tensor = _FeatureSum.apply(finished, backend, weights, *student)  # type: ignore[no-untyped-call]
    return loss


def loss_in_one_call(
    student: Sequence[Tensor],
    teachers: Sequence[Tensor],
    weights: Tensor,
    reduction: str,
    scale: float | Tensor | None,
    backend: str,
) -> Tensor | None:
    """Fast path of the autograd form: one C++ call. Returns None for unsupported or invalid input; the general path
    reports the error.
    """
    if way_of_call() is not KERNEL:
        return None
    whole = whole_losses(backend, first_of(student), maps=True)
    finished = None if whole is None else whole.whole_feature_loss(student, teachers, weights, reduction, scale)
    if finished is None:
        return None
    needs_grad = finished.buffer is not None or finished.error is not None
    return _attached(finished, backend, weights, student) if needs_grad else finished.loss


class FeatureOptions(NamedTuple):
    """Keywords of `camkd_feature_loss_and_grad`, unchecked."""

    beta: float
    weighting: str | Tensor
    reduction: str
    num_items: float | Tensor | None
    ignore_index: int
    loss_scale: float | Tensor


def loss_and_grad_in_one_call(
    student: Sequence[Tensor],
    teachers: Sequence[Tensor],
    logits: Tensor | Sequence[Tensor] | None,
    target: Tensor,
    second: SecondLabels | None,
    options: FeatureOptions,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]] | None:
    """Fast path of `camkd_feature_loss_and_grad` with confidence weights: one C++ call, as above."""
    beta, weighting, reduction, num_items, ignore_index, loss_scale = options
    if way_of_call() is not KERNEL or logits is None or isinstance(logits, Tensor):
        return None
    if not isinstance(weighting, str) or weighting != "confidence":
        return None
    whole = whole_losses(backend, first_of(student), maps=True)
    if whole is None or whole_losses(backend, first_of(logits)) is not whole:
        return None
    return whole.feature_loss_and_grad(
        student, teachers, logits, target, beta, reduction, num_items, ignore_index, loss_scale, second
    )


@torch.library.custom_op("camkd_fast::feature_loss", mutates_args=())
def _feature_loss_op(
    student: Sequence[Tensor],
    teachers: Sequence[Tensor],
    weights: Tensor,
    scale: Tensor | None,
    grad_scale: Tensor | None,
    numbers: Sequence[float],
    backend: str,
) -> list[Tensor]:
    """The loss, the errors and K gradients. `numbers` stand for `scale` and `grad_scale` where these are None."""
    scales = [n if tensor is None else tensor for n, tensor in zip(numbers, (scale, grad_scale), strict=True)]
    result = _loss_and_grad(FeatureCall(student, teachers, weights, backend), *scales)
    return [result.loss, result.error, *result.grads]


@_feature_loss_op.register_fake
def _(
    student: Sequence[Tensor],
    teachers: Sequence[Tensor],
    weights: Tensor,
    scale: Tensor | None,
    grad_scale: Tensor | None,
    numbers: Sequence[float],
    backend: str,
) -> list[Tensor]:
    error = _new_errors(student)
    return [error.new_empty(()), error, *_new_gradients(student)]


def _loss_and_grad(call: FeatureCall, scale: float | Tensor, grad_scale: float | Tensor) -> FeatureLossResult:
    factors = [factor for factor in (scale, grad_scale) if isinstance(factor, Tensor)]
    backend = backend_for(call.backend, [*call.student, *call.teachers], [call.weights, *factors], maps=True)
    return backend.feature_loss(*call[:3], needs_grad=True, scale=scale, grad_scale=grad_scale)


def feature_loss_and_grad(
    call: FeatureCall, scale: float | Tensor, grad_scale: float | Tensor, way: Way
) -> FeatureLossResult:
    """The loss of `feature_loss_sum` and d(grad_scale * loss) / d student in one pass; records no graph.

    Args:
        scale, grad_scale: numbers, or (1,) in the accumulation dtype.
    """
    if way is Way.KERNEL:
        return _loss_and_grad(call, scale, grad_scale)
    if way is Way.EXPRESSION:
        return reference.feature_loss(*call[:3], needs_grad=True, scale=scale, grad_scale=grad_scale)
    tensors = [factor if isinstance(factor, Tensor) else None for factor in (scale, grad_scale)]
    numbers = [1.0 if isinstance(factor, Tensor) else float(factor) for factor in (scale, grad_scale)]
    loss, error, *grads = _feature_loss_op(
        list(call.student), list(call.teachers), call.weights, *tensors, numbers, call.backend
    )
    return FeatureLossResult(loss, error, grads, None)
