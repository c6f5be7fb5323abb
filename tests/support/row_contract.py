"""What every backend's `row_loss` must satisfy, for tests that call it directly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from camkd_fast.backends import reference
from camkd_fast.backends.contract import PER_TEACHER, RowLossResult, SecondLabels
from camkd_fast.losses.formula import Formula
from tests.support.cases import Case, make_case
from tests.support.evaluate import Result
from tests.support.tolerance import assert_result

RowFunction = Callable[..., RowLossResult]


def options(**changes: Any) -> dict[str, Any]:
    """Keyword arguments of `row_loss`; changes are fields of the formula or arguments."""
    formula = Formula(**{name: changes.pop(name) for name in Formula._fields if name in changes}).checked()
    return {"formula": formula, "needs_grad": True, "grad_scale": 1.0, **changes}


def second_of(case: Case) -> SecondLabels | None:
    """The second labels of a case, for a backend."""
    if case.second_target is None or case.mix is None:
        return None
    return SecondLabels(case.second_target.reshape(-1), case.mix.reshape(-1))


def _widened(formula: Formula, grad_scale: float | Tensor, **given: Any) -> dict[str, Any]:
    """The same arguments with tensors in float64."""
    wide = [value.double() if isinstance(value, Tensor) else value for value in (*formula, grad_scale)]
    second = given.pop("second", None)
    if second is not None:
        given["second"] = second._replace(mix=second.mix.double())
    return {"formula": Formula(*wide[:-1]), "grad_scale": wide[-1], **given}


def _result(rows: RowLossResult) -> Result:
    """Row statistics before any reduction, or with means the means."""
    loss, hard, soft = rows.row_stats[:PER_TEACHER] if rows.means is None else (rows.means[0], *rows.means[1][:2])
    return Result(loss, hard, soft, rows.weights, rows.teacher_ce, rows.divergence, rows.grad_student)


def _case(student: Tensor, teachers: Sequence[Tensor], target: Tensor, given: dict[str, Any]) -> Case:
    reduction = "mean" if given.get("mean") else "none"
    return Case(student, tuple(teachers), target, reduction=reduction, **given["formula"].options())


def _assert_rule(actual: Result, student: Tensor, teachers: Sequence[Tensor], target: Tensor, **given: Any) -> None:
    """The tolerance rule with R and N from the reference in float64 and in float32."""
    R = _result(reference.row_loss(student.double(), [z.double() for z in teachers], target, **_widened(**given)))
    N = _result(reference.row_loss(student, teachers, target, **given))
    # finfo.min / T overflows in eager float32 where T < 1. R in its place makes the rule stricter there.
    N = Result(*(n if n is None else n.where(n.isfinite(), r.to(n.dtype)) for n, r in zip(N, R, strict=True)))
    assert_result(actual, _case(student, teachers, target, given), R, N, scale=float(given["grad_scale"]))


def assert_agrees(
    row_loss: RowFunction, student: Tensor, teachers: list[Tensor], target: Tensor, **changes: object
) -> None:
    """`row_loss` against the reference: same infinities, same NaN, zero on ignored rows, accurate elsewhere."""
    given = options(**changes)
    actual = _result(row_loss(student, teachers, target, **given))
    _assert_rule(actual, student, teachers, target, **given)
    ignored = target == given["formula"].ignore_index
    assert not any(statistic[..., ignored].any() for statistic in actual[:6])
    assert not actual.grad[ignored].any()


def assert_invalid_second_labels(backend: Any, label: int) -> None:
    """A second label or a share out of range makes its row NaN, and no other one, where the host does not check it. A
    class may be the ignored label: as a second one it is invalid.
    """
    ignore_index = label if 0 <= label < 40 else -100
    case = make_case(9, 40, 2, two_labels=True)
    second = second_of(case)
    assert second is not None
    # None of the others has that label
    case = case.with_(target=case.target.where(case.target != ignore_index, ignore_index + 1))
    second = second._replace(target=second.target.where(second.target != ignore_index, ignore_index + 1))
    wrong = SecondLabels(second.target.clone(), second.mix.clone())
    wrong.target[2] = label
    wrong.mix[4], wrong.mix[6] = 1.25, float("nan")
    student, teachers = case.student, list(case.teachers)
    ours, expected = (
        backend.row_loss(student, teachers, case.target, **options(second=s, ignore_index=ignore_index))
        for s in (wrong, second)
    )
    invalid = torch.isin(torch.arange(9), torch.tensor([2, 4, 6]))
    rows = [*ours.row_stats[:2], *ours.teacher_ce]
    assert all(row[invalid].isnan().all() for row in rows) and ours.grad_student[invalid].isnan().all()
    assert torch.equal(ours.row_stats[:, ~invalid], expected.row_stats[:, ~invalid])
    assert torch.equal(ours.grad_student[~invalid], expected.grad_student[~invalid])
    weights, ce, _ = backend.confidence_forward(teachers, case.target, ignore_index, second=wrong)
    assert ce[:, invalid].isnan().all() and not ce[:, ~invalid].isnan().any() and not weights[:, ~invalid].isnan().any()


def assert_means(
    row_loss: RowFunction,
    student: Tensor,
    teachers: list[Tensor],
    target: Tensor,
    scale: float | Tensor,
    **changes: Any,
) -> None:
    """With `mean` the backend counts the rows that are not ignored; none, some and all of them are ignored here."""
    some = target.where(torch.arange(len(target)) % 3 > 0, -100)
    for labels in (target, some, torch.full_like(target, -100)):
        divisor = max(int((labels != -100).sum()), 1)
        given = options(grad_scale=scale, mean=True, **changes)
        mean = row_loss(student, teachers, labels, **given)
        assert torch.equal(mean.row_stats, row_loss(student, teachers, labels, **options(**changes)).row_stats)
        assert mean.means[0].shape == () and mean.means[1][2] == torch.tensor(1.0) / divisor
        _assert_rule(_result(mean), student, teachers, labels, **given)
        assert not mean.grad_student[labels == -100].any()
