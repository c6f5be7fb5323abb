"""What a student learns from: one small object per strategy, all called alike by the step.

A strategy is a module, so that what it must train itself (the feature maps r_k) is found by the optimiser.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ..feature_loss import CAMKDFeatureLoss
from ..logit_loss import camkd_loss
from ..models.protocol import Prediction
from .teachers import Teachers


class Objective(NamedTuple):
    """A strategy's verdict on one batch."""

    loss: Tensor  # scalar, differentiable
    weights: Tensor | None = None  # (K, N) weight of each teacher's logits, detached
    feature_weights: Tensor | None = None  # (K, N) weight of each teacher's feature map, detached


class Strategy(nn.Module):
    """`teachers` is None for a strategy that asks nobody, and then `taught` is always empty."""

    teachers: Teachers | None = None

    def forward(self, student: Prediction, taught: list[Prediction], target: Tensor) -> Objective:
        raise NotImplementedError


class HardLabels(Strategy):
    """Cross-entropy with the labels alone."""

    def forward(self, student: Prediction, taught: list[Prediction], target: Tensor) -> Objective:
        return Objective(F.cross_entropy(student.logits, target))


class LogitDistillation(Strategy):
    """CE + alpha T^2 sum_k w_k KL_k; weighting "uniform" is AVER, "confidence" CA-MKD without features."""

    def __init__(self, teachers: Teachers, weighting: str, alpha: float = 1.0, temperature: float = 4.0) -> None:
        super().__init__()
        self.teachers = teachers
        self.weighting, self.alpha, self.temperature = weighting, alpha, temperature

    def forward(self, student: Prediction, taught: list[Prediction], target: Tensor) -> Objective:
        out = camkd_loss(
            student.logits,
            [teacher.logits for teacher in taught],
            target,
            temperature=self.temperature,
            soft_weight=self.alpha,
            weighting=self.weighting,
        )
        return Objective(out.loss, out.weights)


class CAMKD(LogitDistillation):
    """The whole method: confidence-weighted logits plus beta times the confidence-weighted feature loss."""

    def __init__(
        self,
        teachers: Teachers,
        student_features: int,
        alpha: float = 1.0,
        beta: float = 50.0,
        temperature: float = 4.0,
    ) -> None:
        super().__init__(teachers, "confidence", alpha, temperature)
        self.beta = beta
        self.heads = teachers.heads
        self.feature_loss = CAMKDFeatureLoss(student_features, teachers.num_features)

    def forward(self, student: Prediction, taught: list[Prediction], target: Tensor) -> Objective:
        logits = super().forward(student, taught, target)
        features = self.feature_loss(student.features, [teacher.features for teacher in taught], self.heads, target)
        return Objective(logits.loss + self.beta * features.loss, logits.weights, features.weights)
