"""The loss from hidden states and heads against its formulas with all logits at once."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.autograd import gradcheck

from camkd_fast import CAMKDLinearLoss, camkd_linear_loss, confidence_weights
from camkd_fast.losses.linear_rows import chunks, row_groups, valid_rows
from tests.support.linear_cases import LinearCase, LinearResult, evaluate, make_linear_case, run, unfused
from tests.support.tolerance import assert_accurate, assert_near, rms, unit

DIVERGENCES = ["forward_kl", "reverse_kl", ("jsd", 0.3), ("skew", 0.2)]
MAPS: dict[str, Any] = {
    "student_logit_scale": 0.5, "student_softcap": 5.0, "teacher_logit_scales": (2.0, 1.0),
    "teacher_softcaps": (None, 4.0),
}  # fmt: skip


def assert_rule(case: LinearCase, grad_output: Tensor | None = None, **keywords: Any) -> LinearResult:
    """Every number and gradient within the tolerance rule of the formulas in float64."""
    R, N = (unfused(case, dtype, grad_output) for dtype in (torch.float64, torch.float32))
    ours = run(case, grad_output, **keywords)
    for name, a, r, n in zip(LinearResult._fields, ours, R, N, strict=True):
        if r is None:
            assert a is None
            continue
        # Sums of N products of up to `widest` terms are in another order than N's.
        floor = 8 * torch.finfo(torch.float32).eps * (1 + float(r.abs().max()) if r.numel() else 0.0)
        assert_accurate(a, r, n, name, 0.0 if name.startswith("grad") and r.numel() > 100 and r.any() else floor)
    return ours


# --- the formulas ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk_rows", [None, 5, 16])
@pytest.mark.parametrize("weighting", ["confidence", "uniform", "entropy", "min_ce"])
def test_reductions_and_weightings(weighting: str, chunk_rows: int | None, reduction: str) -> None:
    case = make_linear_case(60, 70, ignored=0.2, weighting=weighting, reduction=reduction, hard_weight=0.5)
    assert_rule(case, torch.randn(60) if reduction == "none" else None, chunk_rows=chunk_rows)


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 3.0},
    {"temperature": 2.0, "scale_by_t2": False, "hard_weight": 1.0},
    {"z_loss_weight": 0.1, "soft_weight": 0.5},
    MAPS,
    {**MAPS, "z_loss_weight": 0.1, "reduction": "sum"},
    {"num_items": 7, "hard_weight": 1.0},
    {"num_items": torch.tensor(3.0)},
    {"biased": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_divergences_and_constants(divergence: Any, options: dict[str, Any]) -> None:
    assert_rule(make_linear_case(60, 70, ignored=0.2, divergence=divergence, **options), chunk_rows=16)


@pytest.mark.parametrize("C", [1, 33, 1128, 32000])
@pytest.mark.parametrize("widths", [(8, 12), (65, 3, 130), (17, 17, 17, 17, 17, 17)])
def test_sizes(widths: tuple[int, ...], C: int) -> None:
    assert_rule(make_linear_case(21, C, widths, hard_weight=1.0), chunk_rows=10)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("lead", [(4, 15), (3, 4, 5), (60,)])
def test_leading_dimensions(lead: tuple[int, ...], reduction: str) -> None:
    case = make_linear_case(60, 30, lead=lead, ignored=0.3, reduction=reduction, hard_weight=1.0)
    ours = assert_rule(case, torch.randn(lead) if reduction == "none" else None, chunk_rows=7)
    assert ours.weights.shape == (2, *lead) and ours.entropy.shape == lead


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("weighting", ["confidence", torch.rand(2), torch.rand(2, 4, 14)], ids=["name", "K", "K, B, S"])
def test_shift_predicts_the_next_label(weighting: Any, reduction: str) -> None:
    case = make_linear_case(60, 30, lead=(4, 15), ignored=0.3, reduction=reduction, hard_weight=1.0, shift=True)
    case = case.with_(weighting=weighting)
    ours = assert_rule(case, torch.randn(4, 14) if reduction == "none" else None)
    cut = case.with_(
        hidden=case.hidden[:, :-1], target=case.target[:, 1:], shift=False,
        teacher_hidden=tuple(h[:, :-1] for h in case.teacher_hidden),
    )  # fmt: skip
    if reduction == "mean":
        expected = run(cut)
        assert_near(ours.loss, expected.loss)
        assert_near(ours.grad_hidden[:, :-1], expected.grad_hidden)
        assert not ours.grad_hidden[:, -1].any()
    assert ours.divergence.shape == (2, 4, 14)


@st.composite
def cases(draw: Any) -> tuple[LinearCase, int | None]:
    K = draw(st.integers(1, 4))
    N, C = draw(st.integers(0, 40)), draw(st.one_of(st.integers(1, 60), st.sampled_from([127, 2049])))
    options: dict[str, Any] = {
        "weighting": draw(st.sampled_from(["confidence", "uniform", "entropy", "min_ce"])),
        "divergence": draw(st.sampled_from(DIVERGENCES)),
        "temperature": draw(st.sampled_from([1.0, 2.0, 3.0])),
        "hard_weight": draw(st.sampled_from([0.0, 1.0])),
        "z_loss_weight": draw(st.sampled_from([0.0, 0.1])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
    }
    if draw(st.booleans()):
        seed = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
        weights = torch.rand(K, N, generator=seed)
        options["weighting"] = weights.masked_fill(torch.rand(K, N, generator=seed) < draw(st.floats(0, 1)), 0.0)
    case = make_linear_case(
        N, C, (draw(st.integers(1, 20)), *(draw(st.integers(1, 20)) for _ in range(K))),
        ignored=draw(st.sampled_from([0.0, 0.3, 1.0])), biased=draw(st.booleans()), seed=draw(st.integers(0, 1000)),
        **options,
    )  # fmt: skip
    return case, draw(st.sampled_from([None, 1, 3, 16]))


@settings(max_examples=200)
@given(cases())
def test_any_settings(drawn: tuple[LinearCase, int | None]) -> None:
    case, chunk_rows = drawn
    N = len(case.target)
    grad_output = torch.linspace(-1, 2, N) if case.options["reduction"] == "none" else None
    ours, expected = run(case, grad_output, chunk_rows=chunk_rows), unfused(case, torch.float64, grad_output)
    if case.options["weighting"] == "min_ce":  # among equal cross-entropies float32 may take another one
        case = case.with_(weighting=ours.weights)
        expected = unfused(case, torch.float64, grad_output)._replace(
            teacher_ce=ours.teacher_ce, divergence=ours.divergence
        )
    unsure = 1e-2 if case.options["weighting"] == "entropy" else 0.0  # entropies near 0 are rounding errors
    for name, a, b in zip(LinearResult._fields, ours, expected, strict=True):
        if b is None or not b.numel():
            continue
        limit = (2e-5 + unsure) * (1 + float(b.abs().max()))
        assert (a.double() - b.double()).abs().max() <= limit, name
    ignored = case.target == -100
    assert not ours.grad_hidden[ignored].any() and not ours.entropy[ignored].any()


# --- numerics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_models(logits_dtype: torch.dtype | None) -> None:
    """No further from float64 than eager bfloat16, element by element; float32 logits much nearer on average."""
    case = make_linear_case(64, 1000, (64, 96, 32), torch.bfloat16, hard_weight=1.0, ignored=0.1)
    R, eager = unfused(case, torch.float64), unfused_bfloat16(case)
    ours = run(case, logits_dtype=logits_dtype, chunk_rows=20)
    for name in ("loss", "grad_hidden", "grad_head"):
        a, r, e = (getattr(x, name).double() for x in (ours, R, eager))
        size = rms(r)
        assert ((a - r).abs() <= (e - r).abs() + unit(torch.bfloat16) * (2 * r.abs() + 10 * size)).all(), name
    assert ours.grad_head.dtype == torch.bfloat16
    if logits_dtype is not torch.bfloat16:
        for name in ("grad_hidden", "grad_head"):
            error = (getattr(ours, name).double() - getattr(R, name)).norm()
            assert error <= 2 * unit(torch.bfloat16) * getattr(R, name).norm()
        for name in ("loss", "divergence", "entropy", "teacher_ce"):
            assert_near(getattr(ours, name), getattr(R, name).float(), 1e-4, name)


def unfused_bfloat16(case: LinearCase) -> LinearResult:
    """As a model of transformers computes it: logits in bfloat16, then float32."""
    wide = case.to(torch.float32)
    products = [
        (h @ w.t() + (0 if b is None else b)).bfloat16().float()
        for h, w, b in zip(wide.teacher_hidden, wide.teacher_heads, wide.teacher_biases or (None, None), strict=True)
    ]
    eyes = tuple(torch.eye(w.shape[0]) for w in wide.teacher_heads)
    hidden, head, bias = (x.detach().bfloat16().requires_grad_() for x in (case.hidden, case.head, case.bias))
    z = torch.nn.functional.linear(hidden, head, bias).float()
    out = camkd_linear_loss(z, torch.eye(z.shape[-1]), products, eyes, case.target, **case.options)
    return LinearResult(*out[:7], *torch.autograd.grad(out.loss, [hidden, head, bias]))


def test_a_student_near_its_teacher_in_bfloat16() -> None:
    """Gradients of nearly equal distributions are differences of nearly equal numbers."""
    case = make_linear_case(64, 8000, (64, 64), torch.bfloat16, biased=False)
    noise = 0.02 * torch.randn_like(case.head.float())
    case = case.with_(
        teacher_hidden=(case.hidden,), teacher_heads=((case.head.float() + noise).bfloat16(),), weighting="uniform"
    )
    R, ours = unfused(case, torch.float64), run(case, logits_dtype=torch.float32)
    for name in ("grad_hidden", "grad_head"):
        error = (getattr(ours, name).double() - getattr(R, name)).norm() / getattr(R, name).norm()
        assert error < 0.003, (name, error)


def test_the_chunks_decide_only_the_order_of_sums() -> None:
    case = make_linear_case(1024, 500, (32, 48, 16), hard_weight=1.0, ignored=0.1, spread=5.0)
    whole = run(case, chunk_rows=1024)
    for rows in (1, 37, 256, 512):
        ours = run(case, chunk_rows=rows)
        assert abs(float(ours.loss) - float(whole.loss)) <= 1e-6 * abs(float(whole.loss))
        for name in ("grad_hidden", "grad_head", "grad_bias"):
            assert_near(getattr(ours, name), getattr(whole, name), 1e-5, name)
        again = run(case, chunk_rows=rows)
        assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["constants", "maps", "all ignored", "one row", "routed"])
def test_gradcheck(kind: str, reduction: str, divergence: Any) -> None:
    options: dict[str, Any] = {"divergence": divergence, "reduction": reduction, "hard_weight": 0.5, "temperature": 1.5}
    options |= {**MAPS, "z_loss_weight": 0.3} if kind == "maps" else {}
    options |= {"weighting": torch.tensor([[0, 0.5, 1, 0, 0], [1, 0, 0.5, 0, 2]])} if kind == "routed" else {}
    case = make_linear_case(5, 6, (3, 4, 2), torch.float64, ignored=1.0 if kind == "all ignored" else 0.0, **options)
    if kind == "one row":
        case = case.with_(target=case.target.where(torch.arange(5) == 2, -100))
    parameters = [x.clone().requires_grad_() for x in (case.hidden, case.head, case.bias)]
    assert gradcheck(lambda *of: evaluate(case, *of, chunk_rows=2).loss, parameters)


# --- which rows, which teachers --------------------------------------------------------------------------------------


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
    first = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}
    shapes = [e.input_shapes[first[e.name] : first[e.name] + 2] for e in profile.events() if e.name in first]
    return sum(2 * rows * inner * columns for (rows, inner), (_, columns) in shapes)


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


# --- autograd --------------------------------------------------------------------------------------------------------


def test_an_incoming_gradient_multiplies_all_of_them() -> None:
    case = make_linear_case(60, 30, hard_weight=1.0)
    once, scaled = run(case), run(case, torch.tensor(0.37))
    for name in ("grad_hidden", "grad_head", "grad_bias"):
        assert_near(getattr(scaled, name), 0.37 * getattr(once, name))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_retained_graph_can_be_used_again(reduction: str) -> None:
    case = make_linear_case(20, 30, hard_weight=1.0, reduction=reduction)
    parameters = [x.clone().requires_grad_() for x in (case.hidden, case.head, case.bias)]
    loss = evaluate(case, *parameters).loss.sum()
    first = [g.clone() for g in torch.autograd.grad(loss, parameters, retain_graph=True)]
    (2 * loss).backward(retain_graph=True)
    for parameter, gradient in zip(parameters, first, strict=True):
        assert_near(parameter.grad, 2 * gradient)
        parameter.grad.zero_()
    loss.backward()
    for parameter, gradient in zip(parameters, first, strict=True):
        assert_near(parameter.grad, gradient)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_parameter_changed_before_backward_raises(reduction: str) -> None:
    case = make_linear_case(20, 30, hard_weight=1.0, reduction=reduction)
    for changed in range(3):
        leaves = [x.clone().requires_grad_() for x in (case.hidden, case.head, case.bias)]
        parameters = [x * 1.0 for x in leaves]
        loss = evaluate(case, *parameters).loss.sum()
        with torch.no_grad():
            parameters[changed].add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_double_backward_raises() -> None:
    case = make_linear_case(20, 30)
    hidden = case.hidden.clone().requires_grad_()
    (grad,) = torch.autograd.grad(evaluate(case, hidden, case.head, case.bias).loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward through the loss is not supported"):
        grad.sum().backward()


def test_inputs_are_not_changed() -> None:
    case = make_linear_case(60, 30, ignored=0.3, hard_weight=1.0)
    before = case.to(torch.float64).to(torch.float32)
    run(case, chunk_rows=7)
    for name in ("hidden", "head", "bias"):
        assert torch.equal(getattr(case, name), getattr(before, name))
    assert all(torch.equal(a, b) for a, b in zip(case.teacher_hidden, before.teacher_hidden, strict=True))


def test_a_tied_head_adds_up_both_gradients() -> None:
    case = make_linear_case(40, 30, biased=False, hard_weight=1.0)
    embedding = torch.nn.Embedding(30, 8)
    tokens = torch.randint(30, (40,))

    def gradient(fused: bool) -> Tensor:
        embedding.zero_grad()
        hidden = embedding(tokens)
        if fused:
            loss = evaluate(case, hidden, embedding.weight, None).loss
        else:
            of_all = case.with_(hidden=hidden.detach(), head=embedding.weight.detach())
            R = unfused(of_all, torch.float32)
            loss = (hidden * R.grad_hidden).sum() + (embedding.weight * R.grad_head).sum()
        loss.backward()
        return embedding.weight.grad.clone()

    assert_near(gradient(True), gradient(False), 1e-5)


def test_accumulated_over_parts() -> None:
    case = make_linear_case(64, 30, hard_weight=1.0, ignored=0.2, num_items=50)
    whole, total = run(case), [0.0] * 3
    for part in range(0, 64, 16):
        rows = slice(part, part + 16)
        found = run(
            case.with_(
                hidden=case.hidden[rows], target=case.target[rows],
                teacher_hidden=tuple(h[rows] for h in case.teacher_hidden),
            )
        )  # fmt: skip
        total = [t + g for t, g in zip(total, (found.loss, found.grad_head, found.grad_bias), strict=True)]
    for ours, expected in zip(total, (whole.loss, whole.grad_head, whole.grad_bias), strict=True):
        assert_near(ours, expected, 1e-6)


# --- autocast, torch.compile, operators ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_rounds_as_linear_does(dtype: torch.dtype) -> None:
    case = make_linear_case(60, 200, (32, 48, 16), dtype, hard_weight=1.0)
    rounded = case.to(torch.bfloat16)
    expected = run(rounded)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(case.with_(head=case.head.float()) if dtype == torch.bfloat16 else case)
    for name, a, b in zip(LinearResult._fields, ours, expected, strict=True):
        assert_near(a.float(), b.float(), 2 * unit(torch.bfloat16), name)
    assert (
        ours.grad_head.dtype == torch.float32 and ours.grad_hidden.dtype == dtype and ours.loss.dtype == torch.float32
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled(reduction: str) -> None:
    torch._dynamo.reset()
    case = make_linear_case(40, 30, ignored=0.2, hard_weight=1.0, reduction=reduction)

    def loss(hidden: Tensor, head: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        out = evaluate(case, hidden, head, bias)
        return out.loss, out.entropy

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    results = []
    for function in (loss, compiled):
        parameters = [x.clone().requires_grad_() for x in (case.hidden, case.head, case.bias)]
        value, entropy = function(*parameters)
        (0.5 * value).sum().backward()
        results.append([value.detach(), entropy.detach(), *(x.grad for x in parameters)])
    for a, b in zip(*results, strict=True):
        assert_near(a, b)


@pytest.mark.parametrize("name", ["linear_loss", "linear_loss_rows", "linear_loss_rows_backward"])
@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False)])
def test_opcheck(name: str, needs: tuple[bool, ...]) -> None:
    case = make_linear_case(12, 9, ignored=0.2, hard_weight=1.0)
    formula = [1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    parameters = [
        x.clone().requires_grad_(wanted) for x, wanted in zip((case.hidden, case.head, case.bias), needs, strict=True)
    ]
    arguments: list[Any] = [
        *(*parameters, list(case.teacher_hidden), list(case.teacher_heads), list(case.teacher_biases), case.target, 9),
        *(formula, "confidence", "forward_kl", -100, None, None, None, 5, 1e9, None, "auto", list(needs)),
    ]
    if name == "linear_loss":
        arguments += [0.25, None]
    elif name == "linear_loss_rows_backward":
        arguments = [x.detach() if isinstance(x, Tensor) else x for x in arguments] + [torch.randn(12)]
    torch.library.opcheck(getattr(torch.ops.camkd_fast, name), tuple(arguments))


def test_frozen_models_have_no_graph() -> None:
    case = make_linear_case(12, 9)
    assert not evaluate(case, case.hidden, case.head, case.bias).loss.requires_grad
    with torch.no_grad():
        assert not evaluate(case, case.hidden.requires_grad_(), case.head, case.bias).loss.requires_grad


# --- targets, vocabularies, errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("weighting", ["uniform", "entropy", torch.rand(2)], ids=["uniform", "entropy", "given"])
def test_a_mask_in_the_place_of_labels(weighting: Any, reduction: str) -> None:
    case = make_linear_case(40, 30, reduction=reduction, weighting=weighting)
    case = case.with_(target=torch.rand(40) < 0.6)
    ours = assert_rule(case, torch.randn(40) if reduction == "none" else None)
    assert ours.hard is None and ours.teacher_ce is None


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_teacher_may_have_a_bias(reduction: str) -> None:
    """To torch a list of tensors only is another thing than one with None."""
    case = make_linear_case(40, 30, reduction=reduction)
    assert case.teacher_biases is not None
    case = case.with_(teacher_biases=(case.teacher_biases[0], torch.randn(30)))
    assert_rule(case, torch.randn(40) if reduction == "none" else None)


def test_padded_vocabularies_are_cut() -> None:
    case = make_linear_case(40, 30, biased=False, hard_weight=1.0)
    wider = tuple(torch.cat([w, torch.full((5, w.shape[1]), math.nan)]) for w in case.teacher_heads)
    assert torch.equal(run(case.with_(teacher_heads=wider)).grad_head, run(case).grad_head)
    padded = case.with_(head=torch.cat([case.head, torch.full((3, 8), math.nan)]), teacher_heads=wider, vocab_size=30)
    ours = run(padded)
    assert torch.equal(ours.grad_head[:30], run(case).grad_head) and not ours.grad_head[30:].any()
    assert torch.equal(ours.loss, run(case).loss)


def test_weights_are_those_of_confidence_weights() -> None:
    case = make_linear_case(40, 30, biased=False)
    logits = [h @ w.t() for h, w in zip(case.teacher_hidden, case.teacher_heads, strict=True)]
    assert_near(run(case).weights, confidence_weights(logits, case.target)[0])


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"teacher_heads": (torch.zeros(30, 12),)}, ValueError, "teacher_heads holds 1 entries, but teacher_hidden"),
        ({"teacher_hidden": torch.zeros(2, 40, 12)}, TypeError, "teacher_hidden must be a sequence"),
        ({"head": torch.zeros(30, 9)}, ValueError, r"shape \(40, 8\), but its head \(C, H\) has shape \(30, 9\)"),
        ({"head": torch.zeros(30, 8, dtype=torch.bfloat16)}, TypeError, "head is torch.bfloat16, but its hidden"),
        ({"bias": torch.zeros(29)}, ValueError, r"bias has shape \(29,\), but its head has 30 classes"),
        ({"head": torch.zeros(31, 8), "bias": None}, ValueError, r"teacher\[0\]'s head has 30 classes, but the"),
        ({"vocab_size": 31}, ValueError, "student's head has 30 classes, but the vocabulary has 31"),
        ({"vocab_size": 0}, ValueError, "vocab_size must be at least 1, got 0"),
        ({"vocab_size": 2.0}, TypeError, "vocab_size must be an int, got float"),
        ({"target": torch.zeros(40)}, TypeError, "target must be int64 labels or a bool mask, got torch.float32"),
        ({"target": torch.zeros(39, dtype=torch.int64)}, ValueError, r"target has shape \(39,\)"),
        ({"target": torch.full((40,), 30)}, ValueError, "target holds label 30, but there are 30 classes"),
        ({"target": torch.full((40,), 30), "reduction": "sum"}, ValueError, "target holds label 30, but there are"),
        ({"target": torch.ones(40, dtype=torch.bool)}, ValueError, "'confidence' needs labels, but target"),
        ({"target": torch.ones(40, dtype=torch.bool), "weighting": "uniform", "hard_weight": 0.5}, ValueError,
         "hard_weight 0.5 needs labels"),
        ({"weighting": torch.rand(3)}, ValueError, r"weighting has shape \(3,\), but 2 teachers expect \(2,\)"),
        ({"weighting": torch.rand(2, requires_grad=True)}, ValueError, "weighting requires grad"),
        ({"reduction": "sum", "num_items": 3}, ValueError, "num_items is the divisor of reduction='mean'"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows must be at least 1, got 0"),
        ({"num_valid": -1}, ValueError, "num_valid must be at least 0, got -1"),
        ({"max_chunk_bytes": 0.0}, ValueError, "max_chunk_bytes must be finite and > 0, got 0.0"),
        ({"logits_dtype": torch.float16}, ValueError, "logits_dtype must be torch.float32 or torch.bfloat16"),
        ({"shift": True, "hidden": torch.zeros(8)}, ValueError, r"shift needs hidden states \(..., S, H\), got"),
        ({"backend": "tpu"}, ValueError, "got 'tpu'"),
        ({"divergence": "jsd"}, ValueError, "needs its parameter"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_errors_name_both_values(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        run(make_linear_case(40, 30).with_(**changes))


def test_teachers_must_be_frozen_and_dense() -> None:
    case = make_linear_case(40, 30)
    with pytest.raises(ValueError, match=r"teacher\[1\]'s head requires grad"):
        run(case.with_(teacher_heads=(case.teacher_heads[0], case.teacher_heads[1].clone().requires_grad_())))
    with pytest.raises(TypeError, match=r"teacher\[0\]'s hidden must be a dense tensor, got a tensor of layout sparse"):
        run(case.with_(teacher_hidden=(case.teacher_hidden[0].to_sparse(), case.teacher_hidden[1])))


def test_the_module() -> None:
    case = make_linear_case(40, 30, ignored=0.2)
    settings = {"temperature": 2.0, "hard_weight": 0.5, "divergence": ("jsd", 0.5), "chunk_rows": 8}
    module = CAMKDLinearLoss(weighting="uniform", **settings)
    tensors = case.hidden, case.head, list(case.teacher_hidden), list(case.teacher_heads), case.target
    expected = camkd_linear_loss(*tensors, weighting="uniform", student_bias=case.bias, **settings)
    assert torch.equal(module(*tensors, student_bias=case.bias).loss, expected.loss)
    weights = torch.rand(2, 40)
    expected = camkd_linear_loss(*tensors, weighting=weights, **settings)
    assert torch.equal(module(*tensors, weighting=weights).loss, expected.loss)
    assert "divergence=('jsd', 0.5)" in repr(module) and not list(module.parameters())
    with pytest.raises(ValueError, match="got 'num_valid'"):
        CAMKDLinearLoss(num_valid=3)
    with pytest.raises(ValueError, match="temperature must be finite and > 0, got 0"):
        CAMKDLinearLoss(temperature=0)
