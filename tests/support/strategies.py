"""A small model, K teachers of it, and a batch with their outputs, for tests of strategies."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camkd_fast import camkd_loss
from camkd_fast.data.batch import Batch
from camkd_fast.models.protocol import Prediction
from camkd_fast.train import strategies
from camkd_fast.train.strategies import Strategy
from camkd_fast.train.teachers.live import LiveTeachers

FEATURES = 6  # channels of the student
WITH_FEATURES = ("fitnet-mkd", "ca-mkd")
WITH_TEACHERS = tuple(name for name in strategies.names() if name != "ce")


class Tiny(nn.Module):
    """One convolution that halves the image, global average pooling, one linear layer."""

    def __init__(self, channels: int, num_classes: int = 5) -> None:
        super().__init__()
        self.num_features, self.num_classes = channels, num_classes
        self.conv = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.fc = nn.Linear(channels, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()

    def forward_head(self, features: Tensor) -> Tensor:
        return self.fc(features.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def live(K: int) -> LiveTeachers:
    return LiveTeachers([Tiny(3 + k) for k in range(K)], num_classes=5)


class Case(NamedTuple):
    """One batch with the outputs of K teachers and of the student, whose tensors are leaves of the graph."""

    teachers: LiveTeachers
    outputs: list[Prediction]
    student: Prediction
    target: Tensor


def case(K: int, N: int = 7, spread: float = 4.0) -> Case:
    teachers = live(K)
    images = torch.randn(N, 3, 8, 8)
    target = torch.randint(5, (N,))
    # Peaked logits, so that confidences and entropies differ.
    outputs = [p._replace(logits=spread * torch.randn(N, 5)) for p in teachers(Batch(images, target, target, 0))]
    student = Prediction(torch.randn(N, FEATURES, 5, 5).relu_().requires_grad_(), torch.randn(N, 5).requires_grad_())
    return Case(teachers, outputs, student, target)


def logit_loss(strategy: Strategy, batch: Case, **keywords: object):
    logits = [t.logits for t in batch.outputs]
    weighting = strategy.weighting(batch.student.logits, batch.outputs, batch.target)
    return camkd_loss(
        batch.student.logits,
        logits,
        batch.target,
        **{**strategy.formula.options(), "weighting": weighting, **keywords},
    )


def confidence(logits: list[Tensor], target: Tensor) -> Tensor:
    """The weights (K, N) of the paper's formula (eq. 3)."""
    ce = torch.stack([F.cross_entropy(z, target, reduction="none") for z in logits])
    return (1 - ce.softmax(0)) / (len(logits) - 1)
