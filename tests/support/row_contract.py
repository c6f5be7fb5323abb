"""What every backend's `row_loss` must satisfy, for tests that call it directly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from camkd_fast import reference
from tests.support.cases import Case
from tests.support.evaluate import Result
from tests.support.tolerance import assert_result

RowFunction = Callable[..., reference.RowLoss]


def options(**changes: object) -> dict[str, Any]:
    """Keyword arguments of `row_loss`."""
    return {
        "temperature": 4.0, "hard_weight": 1.0, "soft_weight": 1.0, "weighting": "confidence", "ignore_index": -100,
        "needs_grad": True, "residual_scale": None, **changes,
    }  # fmt: skip


def _result(rows: reference.RowLoss) -> Result:
    """Row statistics before any reduction, or with means the means."""
    loss, hard, soft = rows.rows if rows.means is None else (rows.means[0], *rows.means[1][:2])
    return Result(loss, hard, soft, rows.weights, rows.teacher_ce, rows.divergence, rows.residual)


def _case(student: Tensor, teachers: Sequence[Tensor], target: Tensor, given: dict[str, Any]) -> Case:
    names = ("temperature", "hard_weight", "soft_weight", "weighting", "ignore_index")
    reduction = "mean" if given.get("mean") else "none"
    return Case(student, tuple(teachers), target, reduction=reduction, **{name: given[name] for name in names})


def _assert_rule(actual: Result, student: Tensor, teachers: Sequence[Tensor], target: Tensor, **given: Any) -> None:
    """The tolerance rule with R and N from the reference in float64 and in float32."""
    wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in given.items()}
    R = _result(reference.row_loss(student.double(), [z.double() for z in teachers], target, **wide))
    N = _result(reference.row_loss(student, teachers, target, **given))
    # finfo.min / T overflows in eager float32 where T < 1. R in its place makes the rule stricter there.
    N = Result(*(n if n is None else n.where(n.isfinite(), r.to(n.dtype)) for n, r in zip(N, R, strict=True)))
    scale = given["residual_scale"]
    assert_result(actual, _case(student, teachers, target, given), R, N, scale=1.0 if scale is None else float(scale))


def assert_agrees(
    row_loss: RowFunction, student: Tensor, teachers: list[Tensor], target: Tensor, **changes: object
) -> None:
    """`row_loss` against the reference: same infinities, same NaN, zero on ignored rows, accurate elsewhere."""
    given = options(**changes)
    actual = _result(row_loss(student, teachers, target, **given))
    _assert_rule(actual, student, teachers, target, **given)
    ignored = target == given["ignore_index"]
    assert not any(statistic[..., ignored].any() for statistic in actual[:6])
    assert not actual.grad[ignored].any()


def assert_means(
    row_loss: RowFunction, student: Tensor, teachers: list[Tensor], target: Tensor, scale: float | Tensor
) -> None:
    """With `mean` the backend counts the rows that are not ignored; none, some and all of them are ignored here."""
    some = target.where(torch.arange(len(target)) % 3 > 0, -100)
    for labels in (target, some, torch.full_like(target, -100)):
        divisor = max(int((labels != -100).sum()), 1)
        given = options(residual_scale=scale, mean=True)
        mean = row_loss(student, teachers, labels, **given)
        assert torch.equal(mean.numbers, row_loss(student, teachers, labels, **options()).numbers)
        assert mean.means[0].shape == () and mean.means[1][2] == torch.tensor(1.0) / divisor
        _assert_rule(_result(mean), student, teachers, labels, **given)
        assert not mean.residual[labels == -100].any()
