"""Strategies that weigh the teachers' logits, and the baseline without teachers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...losses.checks import check_logits
from ...losses.formula import Formula
from ...losses.min_norm import min_norm_weights
from ...models.protocol import Prediction
from ..teachers.live import Teachers
from .base import Setup, Strategy
from .registry import register


@register
class CE(Strategy):
    """Labels only."""

    name, label, color = "ce", "CE only", "#8a8a8a"
    needs_teachers = False


@register
class KD(Strategy):
    """One of the K teachers."""

    name, label, color = "kd", "KD", "#332288"
    options: ClassVar[Mapping[str, Any]] = {"teacher_index": 0}

    def __init__(self, formula: Formula, K: int, teacher_index: int) -> None:
        super().__init__(formula)
        if not 0 <= teacher_index < K:
            raise ValueError(f"teacher_index must lie in [0, {K}) for {K} teachers, got {teacher_index}")
        self.weights: Tensor
        self._index = teacher_index
        self.register_buffer("weights", torch.empty(K, dtype=torch.float32), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weights.copy_(F.one_hot(torch.tensor(self._index, device="cpu"), len(self.weights)))

    @classmethod
    def build(cls, setup: Setup) -> KD:
        assert setup.teachers is not None
        return cls(setup.formula, len(setup.teachers.num_features), setup.options["teacher_index"])

    def use_with(self, teachers: Teachers | None, student_features: int) -> None:
        super().use_with(teachers, student_features)
        assert teachers is not None
        if len(teachers.num_features) != len(self.weights):
            raise ValueError(
                f"{self.name} was made for {len(self.weights)} teachers, but there are {len(teachers.num_features)}"
            )

    def weighting(self, student_logits: Tensor, teacher_outputs: list[Prediction], target: Tensor) -> Tensor:
        return self.weights


@register
class AVER(Strategy):
    """Equal weights."""

    name, label, color = "aver", "AVER", "#e69f00"


@register
class EBKD(Strategy):
    """Teachers with lower output entropy weigh more (Kwon et al. 2020)."""

    name, label, color = "ebkd", "EBKD", "#009e73"
    rule = "entropy"

    @staticmethod
    def divisor(K: int, official: bool) -> int:
        return K if official else max(K - 1, 1)


@register
class AEKD(Strategy):
    """Weights of the min-norm combination of the K gradients of the soft loss (Du et al. 2020).

    One weight per teacher and batch, at most `cap`, from the gradients with respect to the student's (N, C) logits.
    The Gram matrix is summed over all ranks, so weights do not depend on how a batch is split; without gradients it is
    that of this rank, which may evaluate by itself. (The official code averages each gradient over the batch before it
    takes inner products.)
    """

    name, label, color = "aekd", "AEKD", "#cc79a7"
    cap = 0.6

    def weighting(self, student_logits: Tensor, teacher_outputs: list[Prediction], target: Tensor) -> Tensor:
        """One weight per teacher for the batch, (K,) float64."""
        check_logits(student_logits, [teacher.logits for teacher in teacher_outputs], target, None)
        learns = torch.is_grad_enabled()
        with torch.no_grad():
            gram = self._gram(student_logits, teacher_outputs, target)
            if learns and torch.distributed.is_available() and torch.distributed.is_initialized():
                _check_not_joined()
                torch.distributed.all_reduce(gram)
            return min_norm_weights(gram, self.cap)

    def _gram(self, student_logits: Tensor, teacher_outputs: list[Prediction], target: Tensor) -> Tensor:
        """Inner products (K, K) of the gradients."""
        T = self.formula.temperature
        kept = (target != self.formula.ignore_index).unsqueeze(-1)
        q = (student_logits.float() / T).softmax(-1)
        with torch.autocast(q.device.type, enabled=False):
            # The gradients' common factor T / N is left out: it does not change the weights.
            gradients = [
                torch.where(kept, q - (t.logits.float() / T).softmax(-1), 0.0).flatten() for t in teacher_outputs
            ]
            stacked = torch.stack(gradients)
            return stacked @ stacked.T


def _check_not_joined() -> None:
    """
    Raises:
        ValueError: DDP's `join` is in force: a process without batches takes part in the collectives of DDP only.
    """
    if torch.compiler.is_compiling():
        return
    running = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
    if getattr(getattr(running, "_join_config", None), "enable", False):
        raise ValueError(
            f"{AEKD.name} sums over all processes in every batch, but DDP's join lets some end earlier: expected "
            "equally many batches in each process, without join"
        )
