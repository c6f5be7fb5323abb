"""The interface of a strategy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ...losses.formula import Formula
from ...models.protocol import Prediction
from ..teachers.live import Teachers


class FeatureTerm(NamedTuple):
    """Feature loss of one batch."""

    loss: Tensor  # scalar, float32, beta included; differentiable if there are no roots
    weights: Tensor | None  # (K, N) weight of each teacher's map, detached; None if all weigh the same
    roots: Sequence[Tensor] = ()  # of `torch.autograd.backward` in place of the loss
    gradients: Sequence[Tensor] = ()  # d(loss_scale * loss) / d root


class Setup(NamedTuple):
    """Arguments of `Strategy.build`."""

    formula: Formula  # soft_weight after the division, weighting set to the strategy's rule
    teachers: Teachers | None  # None only for strategies without teachers
    student_features: int  # channels of the student's last feature map
    divisor: int  # of alpha and beta
    options: Mapping[str, Any]  # name -> value for each of the strategy's `options`


class Strategy(nn.Module):
    """Base of all strategies; a module, so that the optimiser and DDP see the parameters that it trains.

    `name`, `label` and `color` must be set by every registered class.
    """

    name: ClassVar[str]  # in configs, commands and folders
    label: ClassVar[str]  # in reports
    color: ClassVar[str]  # in plots
    options: ClassVar[Mapping[str, Any]] = {}  # arguments of `create` for this strategy, with its defaults
    needs_teachers: ClassVar[bool] = True
    needs_features: ClassVar[bool] = False
    needs_heads: bool = False  # applies the teachers' heads to other maps than theirs
    rule: ClassVar[str] = "uniform"  # `weighting` of camkd_loss
    unweighted: ClassVar[str | None] = None  # name of the strategy with the same losses and equal weights

    def __init__(self, formula: Formula) -> None:
        super().__init__()
        self.formula = formula

    @classmethod
    def build(cls, setup: Setup) -> Strategy:
        """An instance for one run.

        Raises:
            ValueError: an option or the teachers are invalid for this strategy.
        """
        return cls(setup.formula)

    def use_with(self, teachers: Teachers | None, student_features: int) -> None:
        """Use the strategy with these models, which need not be those that it was built for.

        Raises:
            ValueError: they do not fit.
        """
        if self.needs_teachers and teachers is None:
            raise ValueError(f"{self.name} learns from teachers, but none were given")

    def to_device(self, device: torch.device | str | int | None) -> None:
        """Move the strategy. What is on meta has no values: it is initialised as when the strategy was made.

        Raises:
            ValueError: a module with parameters or buffers on meta has no `reset_parameters`.
        """
        for name, module in self.named_modules():
            tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            empty = any(tensor.is_meta for tensor in tensors) and torch.device(device or "meta").type != "meta"
            reset: Any = getattr(module, "reset_parameters", None)
            if empty and reset is None:
                kind = type(module).__name__
                raise ValueError(f"{name or 'tensors'} of {self.name} on meta: {kind} has no reset_parameters")
            module._apply(partial(_moved, device), recurse=False)
            if empty:
                reset()

    @staticmethod
    def divisor(K: int, official: bool) -> int:
        """Divisor of alpha (table of the package)."""
        return 1

    def weighting(self, student_logits: Tensor, teacher_outputs: list[Prediction], target: Tensor) -> str | Tensor:
        """`weighting` of camkd_loss for this batch: a rule's name, or detached weights (K,) or (K, N)."""
        return self.formula.weighting

    def feature_term(
        self,
        student: Prediction,
        teacher_outputs: list[Prediction],
        target: Tensor,
        num_items: float | Tensor | None = None,
        loss_scale: Tensor | None = None,
        **second: Tensor,
    ) -> FeatureTerm | None:
        """Feature loss of this batch.

        Args:
            second: `second_target` and `mix` of mixed images, as in camkd_loss; else nothing.
            num_items: divides the sum over samples, as in camkd_loss.
            loss_scale: (1,) float32 in a training step, where the term may have roots and their gradients; None asks
                for a differentiable loss.
        """
        return None


def _moved(device: torch.device | str | int | None, tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device=device)
