"""The interface of a strategy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

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
    needs_heads: ClassVar[bool] = False  # applies the teachers' heads to other maps than theirs
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
