"""Whole losses in one call of the compiled module, unchecked arguments included: the fast path of ordinary tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..losses.formula import Formula
from .contract import SecondLabels

# The loss of a batch, as C++ makes it: a named tuple would be made anew in Python, at a third of the cost of a call.
WholeLoss: TypeAlias = tuple[
    Tensor,  # loss: (), or the target's shape for reduction "none"
    Tensor,  # row_stats (3 + 3K, N)
    Tensor | None,  # grad_student (N, C): d(loss_scale * loss) / d student
    tuple[float, float, float] | None,  # sums as in RowLossResult
    tuple[Tensor, Tensor] | None,  # means likewise, for every reduction but "none"
    float | None,  # what the sums are multiplied by, if the host knows it; None for reduction "none"
]


class WholeFeatureLoss(NamedTuple):
    """The feature loss, and what its gradients need; None where no gradient is required."""

    loss: Tensor  # ()
    error: Tensor | None  # (K, N), for the gradient of the weights
    buffer: Tensor | None  # (1, size): the memory of all gradients of the maps
    layouts: Sequence[tuple[Sequence[int], Sequence[int], int]] | None  # of each gradient: shape, strides, offset
    scale: float | Tensor  # as in Backend.feature_loss


class WholeLosses:
    """The functions of the compiled module for tensors of one device.

    They return None for unsupported or invalid input; the general path then reports the error.

    Args:
        module: the compiled one.
        prefix: of its functions for this device.
        options: their last arguments.

    Attributes:
        connected: whether C++ reads and makes tensors, as with torch >= 2.10; without that there is no fast path.
    """

    _logit_loss: Callable[..., Any]
    _confidence_weights: Callable[..., Any]
    _confidence_gradients: Callable[..., Any]
    _whole_feature_loss: Callable[..., Any]
    _feature_gradients: Callable[..., Any]
    _feature_loss_and_grad: Callable[..., Any]

    def __init__(self, module: ModuleType, prefix: str, options: Callable[[], tuple[Any, ...]]) -> None:
        for name in WholeLosses.__annotations__:
            setattr(self, name, getattr(module, prefix + name[1:], None))  # None in a build without CUDA kernels
        self._options = options
        api = getattr(Tensor, "__dlpack_c_exchange_api__", None)
        self.connected: bool = module.connect_tensors(api, Tensor, torch.nn.Parameter)

    def logit_loss(
        self,
        student: Tensor,
        teachers: Tensor | Sequence[Tensor],
        target: Tensor,
        formula: Formula,
        reduction: str,
        num_items: float | Tensor | None,
        loss_scale: float | Tensor | None,
        second: SecondLabels | None = None,
    ) -> WholeLoss | None:
        """There is a gradient if there is a loss_scale, or if the student requires one."""
        return self._logit_loss(  # type: ignore[no-any-return]
            student,
            teachers,
            target,
            second,
            formula,
            reduction,
            num_items,
            loss_scale,
            torch.is_grad_enabled(),
            *self._options(),
        )

    def confidence_weights(
        self,
        logits: Tensor | Sequence[Tensor],
        target: Tensor,
        ignore_index: int,
        second: SecondLabels | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Weights and cross-entropies (K, ...), and what `confidence_gradients` takes, if one of the logits requires
        grad: (2, K, N), the log-sum-exps and the weights again.
        """
        return self._confidence_weights(  # type: ignore[no-any-return]
            logits, target, second, ignore_index, torch.is_grad_enabled(), *self._options()
        )

    def confidence_gradients(
        self,
        logits: Sequence[Tensor],
        target: Tensor,
        ignore_index: int,
        kept: Tensor,
        grad_weights: Tensor | None,
        grad_ce: Tensor | None,
        second: SecondLabels | None = None,
    ) -> list[Tensor] | None:
        """The gradients of the logits, from those of the two results of `confidence_weights`; None for 0."""
        return self._confidence_gradients(  # type: ignore[no-any-return]
            logits, target, second, ignore_index, kept, grad_weights, grad_ce, *self._options()
        )

    def whole_feature_loss(
        self,
        student: Sequence[Tensor],
        teachers: Sequence[Tensor],
        weights: Tensor,
        reduction: str,
        scale: float | Tensor | None,
    ) -> WholeFeatureLoss | None:
        """The loss for "mean" or "sum"; `scale` takes the place of 1 / N or 1."""
        found = self._whole_feature_loss(
            student, teachers, weights, reduction, scale, torch.is_grad_enabled(), *self._options()
        )
        return None if found is None else WholeFeatureLoss(*found)

    def feature_gradients(
        self,
        buffer: Tensor | None,
        error: Tensor | None,
        grad_output: Tensor,
        scale: float | Tensor,
        retained: bool,
    ) -> tuple[Tensor | None, Tensor | None] | None:
        """`buffer` times grad_output, in place unless `retained`, and error * scale * grad_output."""
        return self._feature_gradients(  # type: ignore[no-any-return]
            buffer, error, grad_output, scale, retained, *self._options()
        )

    def feature_loss_and_grad(
        self,
        student: Sequence[Tensor],
        teachers: Sequence[Tensor],
        logits: Sequence[Tensor],
        target: Tensor,
        beta: float,
        reduction: str,
        num_items: float | Tensor | None,
        ignore_index: int,
        loss_scale: float | Tensor,
        second: SecondLabels | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]] | None:
        """Loss, weights, cross-entropies (K, N) and gradients, by the confidence weights of the logits."""
        return self._feature_loss_and_grad(  # type: ignore[no-any-return]
            student,
            teachers,
            logits,
            target,
            second,
            beta,
            reduction,
            num_items,
            ignore_index,
            loss_scale,
            *self._options(),
        )
