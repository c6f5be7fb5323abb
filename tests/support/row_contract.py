"""What every backend's `row_loss` owes the reference, for tests that call it directly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from camkd_fast.backends import reference

RowFunction = Callable[..., reference.RowLoss]


def options(**changes: object) -> dict[str, Any]:
    return {
        "temperature": 4.0, "hard_weight": 1.0, "soft_weight": 1.0, "weighting": "confidence", "ignore_index": -100,
        "needs_grad": True, "residual_scale": None, **changes,
    }  # fmt: skip


def assert_agrees(
    row_loss: RowFunction, student: Tensor, teachers: list[Tensor], target: Tensor, **changes: object
) -> None:
    """The backend call against the reference in float64: same infinities, same NaN, close elsewhere."""
    given = options(**changes)
    actual = row_loss(student, teachers, target, **given)
    wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in given.items()}
    expected = reference.row_loss(student.double(), [z.double() for z in teachers], target, **wide)
    for name in ("rows", "divergence", "teacher_ce", "weights", "residual"):
        ours, theirs = getattr(actual, name).double(), getattr(expected, name)
        same = torch.isclose(ours, theirs, rtol=2e-5, atol=2e-6, equal_nan=True)
        assert same.all(), f"{name}: {ours[~same][:5]} instead of {theirs[~same][:5]}"


def assert_means(
    row_loss: RowFunction, student: Tensor, teachers: list[Tensor], target: Tensor, scale: float | Tensor
) -> None:
    """With `mean` the backend counts the rows itself, and ignored ones do not count: none, some and all of them."""
    some = target.where(torch.arange(len(target)) % 3 > 0, -100)
    for labels in (target, some, torch.full_like(target, -100)):
        divisor = max(int((labels != -100).sum()), 1)
        one = row_loss(student, teachers, labels, **options())
        mean = row_loss(student, teachers, labels, **options(residual_scale=scale, mean=True))
        expected = reference.row_loss(student, teachers, labels, **options(residual_scale=scale, mean=True))
        assert torch.equal(mean.numbers, one.numbers)
        torch.testing.assert_close(mean.residual, one.residual * (float(scale) / divisor))
        torch.testing.assert_close(mean.residual, expected.residual, rtol=1e-4, atol=1e-6)
        loss, others = mean.means
        assert loss.shape == () and others[2] == torch.tensor(1.0) / divisor
        torch.testing.assert_close(torch.stack([loss, *others[:2]]), one.numbers[:3].sum(1) / divisor)
        torch.testing.assert_close(mean.means, expected.means, rtol=1e-5, atol=1e-5)
