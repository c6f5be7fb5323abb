"""Which rows and teachers of the linear loss are computed, and with how many operations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from camkd_fast.losses.linear_rows import chunks, row_groups, valid_rows
from tests.support.backends import BACKENDS
from tests.support.linear_cases import (
    MAPS,
    LinearCase,
    LinearResult,
    assert_rule,
    evaluate,
    make_linear_case,
    run,
)
from tests.support.tolerance import assert_near


def nan_where(hidden: Tensor, where: Tensor) -> Tensor:
    return hidden.masked_fill(where.unsqueeze(-1), math.nan)


@pytest.mark.parametrize("num_valid", [None, 60, 50])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_rows_are_not_computed(reduction: str, num_valid: int | None) -> None:
    case = make_linear_case(60, 30, ignored=0.5, reduction=reduction, hard_weight=1.0, num_valid=num_valid)
    ignored = case.target == -100
    assert 10 < int(ignored.sum()) < 50
    spoiled = case.with_(
        hidden=nan_where(case.hidden, ignored), teacher_hidden=tuple(nan_where(h, ignored) for h in case.teacher_hidden)
    )
    grad_output = torch.randn(60) if reduction == "none" else None
    ours, expected = run(spoiled, grad_output, chunk_rows=8), run(case, grad_output, chunk_rows=8)
    for name, a, b in zip(LinearResult._fields, ours, expected, strict=True):
        assert torch.equal(a, b), name
    assert not ours.grad_hidden[ignored].any()
    assert_rule(case, grad_output, chunk_rows=8)


@pytest.mark.parametrize("N", [0, 12])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_row_that_counts(reduction: str, N: int) -> None:
    case = make_linear_case(N, 30, ignored=1.0, reduction=reduction, hard_weight=1.0, z_loss_weight=1.0)
    case = case.with_(hidden=torch.full_like(case.hidden, math.nan))
    for keywords in ({}, {"num_valid": 0}, {"num_items": torch.tensor(0)} if reduction == "mean" else {}):
        ours = run(case, torch.ones(N) if reduction == "none" else None, **keywords)
        assert not any(x.any() for x in ours) and ours.grad_head.shape == case.head.shape


def test_routing_is_a_loop_over_groups() -> None:
    case = make_linear_case(600, 40, (8, 12, 6, 9), hard_weight=1.0, biased=False, ignored=0.1)
    teacher = torch.randint(3, (600,))
    weights = torch.nn.functional.one_hot(teacher, 3).t().float()
    spoiled = tuple(nan_where(h, teacher != k) for k, h in enumerate(case.teacher_hidden))
    ours = run(case.with_(teacher_hidden=spoiled), weighting=weights)
    kept, total = (case.target != -100), 0.0
    grads = [torch.zeros_like(case.hidden), torch.zeros_like(case.head)]
    for k in range(3):
        rows = teacher == k
        part = case.with_(
            hidden=case.hidden[rows], target=case.target[rows], teacher_hidden=(case.teacher_hidden[k][rows],),
            teacher_heads=(case.teacher_heads[k],), weighting="uniform", reduction="sum",
        )  # fmt: skip
        found = run(part)
        total += float(found.loss)
        grads[0][rows] = found.grad_hidden
        grads[1] += found.grad_head
        assert_near(ours.divergence[k, rows], found.divergence[0])
        assert not ours.divergence[k, ~rows].any() and not ours.teacher_ce[k, ~rows].any()
    assert abs(float(ours.loss) * int(kept.sum()) - total) <= 1e-5 * total
    assert_near(ours.grad_hidden * int(kept.sum()), grads[0], 1e-5)
    assert_near(ours.grad_head * int(kept.sum()), grads[1], 1e-5)


@pytest.mark.parametrize("num_valid", [None, 50])
@pytest.mark.parametrize("kind", ["per teacher", "one-hot", "some of each", "few rows", "no teacher"])
def test_a_teacher_without_weight_may_hold_anything(kind: str, num_valid: int | None) -> None:
    case = make_linear_case(50, 30, (8, 12, 6, 9), ignored=0.1, hard_weight=1.0, **{**MAPS, "teacher_logit_scales": (
        2.0, 1.0, 3.0), "teacher_softcaps": (None, 4.0, 2.0)})  # fmt: skip
    weights = torch.rand(3, 50) + 0.1
    if kind == "per teacher":
        weights[1] = 0.0
    elif kind == "one-hot":
        weights *= torch.nn.functional.one_hot(torch.arange(50) % 3, 3).t()
    elif kind == "some of each":
        weights[torch.rand(3, 50) < 0.5] = 0.0
    elif kind == "few rows":
        weights[0, :48] = 0.0
    else:
        weights[:, ::2] = 0.0
    spoiled = tuple(nan_where(h, w == 0) for h, w in zip(case.teacher_hidden, weights, strict=True))
    expected, ours = (
        run(case, weighting=weights),
        run(case.with_(teacher_hidden=spoiled), weighting=weights, num_valid=num_valid),
    )
    for name, a, b in zip(LinearResult._fields, ours, expected, strict=True):
        assert_near(a, b, 1e-5, name)
    assert_rule(case.with_(weighting=weights), chunk_rows=9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_no_teacher_have_a_hard_loss(backend: str) -> None:
    """In a group of their own, which saves the teachers' products."""
    case = make_linear_case(600, 30, (8, 12, 6), hard_weight=1.0)
    weights = torch.rand(2, 600) + 0.1
    weights[:, :300] = 0.0
    assert [group.size for group in row_groups(None, 600, weights, 2, True)] == [300, 300]
    assert_rule(case.with_(weighting=weights, backend=backend))


def test_groups_of_rows() -> None:
    """A teacher is left out where that saves more than small products cost."""
    N = 3000
    routed = torch.nn.functional.one_hot(torch.arange(N) % 3, 3).t().float()
    groups = row_groups(None, N, routed, 3, True)
    assert [group.teachers for group in groups] == [(0,), (1,), (2,)]
    rows = torch.cat([group.rows for group in groups])
    assert torch.equal(rows.sort().values, torch.arange(N)) and [group.size for group in groups] == [1000] * 3
    assert all(not routed[1:, groups[0].rows].any() for _ in groups)
    assert [g.teachers for g in row_groups(None, N, routed, 3, may_read=False)] == [(0, 1, 2)]
    few = torch.ones(3, N)
    few[1, :20] = 0.0
    assert [g.teachers for g in row_groups(None, N, few, 3, True)] == [(0, 1, 2)]
    one = torch.ones(3, N)
    one[1] = 0.0
    (group,) = row_groups(None, N, one, 3, True)
    assert group.teachers == (0, 2) and group.rows is None
    labels = torch.tensor([3, -100, 2, -100, 1])
    assert valid_rows(labels, -100, None)[0].tolist() == [0, 2, 4]
    assert valid_rows(labels, -100, 3)[0].tolist() == [0, 2, 4]
    assert valid_rows(labels, -100, 4)[0].tolist() == [0, 2, 4, 1] and valid_rows(labels, -100, 9) == (None, 5)
    assert valid_rows(labels[::2], -100, None) == (None, 3)


@pytest.mark.parametrize(
    ("size", "most_rows", "most_bytes", "on_gpu", "expected"),
    [
        (0, None, 1e9, True, []),
        (100, 30, 1e9, True, [25, 25, 25, 25]),
        (8192, None, 1.6e9, True, [2048] * 4),
        (8192, None, 0.9e9, True, [1024] * 8),
        (8192, None, 1.0, True, [512] * 16),
        (1000, None, 1.6e9, False, [250] * 4),
        (100, None, 4e6, False, [5] * 20),
    ],
)
def test_chunks(size: int, most_rows: int | None, most_bytes: float, on_gpu: bool, expected: list[int]) -> None:
    parts = chunks(size, 3 * 128256 * 2, most_bytes, most_rows, 2048, on_gpu)
    assert [part.stop - part.start for part in parts] == expected
    assert not parts or (parts[0].start, parts[-1].stop) == (0, size)


# --- work and memory -------------------------------------------------------------------------------------------------


def operations(call: Any) -> int:
    """Multiplications and additions of the matrix products."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        call()
    first = {"aten::mm": 0, "aten::addmm": 1, "mkldnn::_linear_pointwise": 0}  # where the two matrices are
    total = 0
    for event in profile.events():
        if event.name in first:
            (rows, inner), other = event.input_shapes[first[event.name] :][:2]
            total += 2 * rows * inner * (other[0] if event.name.startswith("mkldnn") else other[1])  # it transposes
    return total


def both_ways(case: LinearCase, frozen: tuple[bool, bool] = (False, False), **keywords: Any) -> None:
    hidden, head = (
        x.detach().clone().requires_grad_(not is_frozen)
        for x, is_frozen in zip((case.hidden, case.head), frozen, strict=True)
    )
    loss = evaluate(case, hidden, head, None, **keywords).loss
    if loss.requires_grad:
        loss.backward()


def test_the_products_that_are_needed_and_no_more() -> None:
    N, C, widths = 512, 300, (32, 48, 16)
    case = make_linear_case(N, C, widths, biased=False)
    s, *t = (2 * N * C * H for H in widths)
    assert operations(lambda: both_ways(case)) == 3 * s + sum(t)
    assert operations(lambda: both_ways(case, chunk_rows=100)) == 3 * s + sum(t)
    assert operations(lambda: both_ways(case, (False, True))) == 2 * s + sum(t)
    assert operations(lambda: both_ways(case, (True, False))) == 2 * s + sum(t)
    assert operations(lambda: both_ways(case, (True, True))) == s + sum(t)
    with torch.no_grad():
        assert operations(lambda: both_ways(case)) == s + sum(t)
    quarter = case.with_(target=case.target.where(torch.arange(N) % 4 == 0, -100))
    assert operations(lambda: both_ways(quarter)) == (3 * s + sum(t)) // 4
    weights = torch.zeros(2, N)
    weights[0, : N // 2], weights[1, N // 2 :] = 1.0, 1.0
    assert operations(lambda: both_ways(case.with_(weighting=weights))) == 3 * s + sum(t) // 2
    assert operations(lambda: both_ways(case.with_(weighting=torch.tensor([0.0, 1.0])))) == 3 * s + t[1]
    wide = case.to(torch.bfloat16)
    assert operations(lambda: both_ways(wide)) == 3 * s + sum(t)
