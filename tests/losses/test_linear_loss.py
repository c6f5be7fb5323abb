"""The loss from hidden states and heads against its formulas with all logits at once."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.autograd import gradcheck

from camkd_fast import camkd_linear_loss
from camkd_fast.system import available_memory
from tests.support.linear_cases import (
    MAPS,
    LinearCase,
    LinearResult,
    assert_rule,
    evaluate,
    make_linear_case,
    run,
    unfused,
)
from tests.support.tolerance import assert_near, rms, unit
from tests.support.torch_version import TORCH

BF16 = torch.bfloat16
DIVERGENCES = ["forward_kl", "reverse_kl", ("jsd", 0.3), ("skew", 0.2)]


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
    if TORCH < (2, 11) and (widths, C) == ((65, 3, 130), 32000):
        pytest.skip("products of older releases have 1.01 times the error that is allowed")
    assert_rule(make_linear_case(21, C, widths, hard_weight=1.0), chunk_rows=10)


@pytest.mark.parametrize("C", [128_256, 151_936, 262_144])
def test_vocabularies_of_language_models(C: int) -> None:
    """Rows and widths are multiples of nothing."""
    assert_rule(make_linear_case(21, C, (65, 3, 130), hard_weight=1.0), chunk_rows=10)


@pytest.mark.slow
@pytest.mark.skipif(available_memory() < 14e9, reason="needs 14 GB")
def test_a_chunk_beyond_2_to_31_elements() -> None:
    N, C = 8200, 262_144
    case = make_linear_case(N, C, (9, 7), BF16, hard_weight=1.0, biased=False)
    keywords = {"logits_dtype": BF16, "max_chunk_bytes": 1e12, "entropy": False}
    whole, parts = (run(case, chunk_rows=rows, **keywords) for rows in (N, 1024))
    assert_near(whole.loss, parts.loss, 1e-6)
    for name in ("grad_hidden", "grad_head", "weights", "teacher_ce", "divergence"):
        assert_near(getattr(whole, name), getattr(parts, name), 2 * unit(BF16), name)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_equal_weights_are_the_mean_over_calls_of_each_teacher(divergence: Any, reduction: str) -> None:
    case = make_linear_case(60, 70, ignored=0.2, divergence=divergence, reduction=reduction, weighting="uniform")
    assert case.teacher_biases is not None
    each = [
        case.with_(teacher_hidden=case.teacher_hidden[k : k + 1], teacher_heads=case.teacher_heads[k : k + 1],
                   teacher_biases=case.teacher_biases[k : k + 1])
        for k in range(2)
    ]  # fmt: skip
    ours, of_each = run(case), [run(one) for one in each]
    for name in ("loss", "soft", "grad_hidden", "grad_head", "grad_bias"):
        first, second = (getattr(result, name) for result in of_each)
        assert_near(getattr(ours, name), (first + second) / 2, 1e-5, name)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("weighting", ["confidence", "one-hot"])
def test_entropies_are_computed_on_request_only(weighting: str, reduction: str, compiled: bool) -> None:
    case = make_linear_case(40, 30, hard_weight=1.0, reduction=reduction, chunk_rows=16, ignored=0.2)
    if weighting == "one-hot":
        case = case.with_(weighting=torch.eye(2)[torch.arange(40) % 2].t().contiguous())
    given = torch.randn(40) if reduction == "none" else None
    asked, ours = run(case, given), run(case.with_(entropy=False), given)
    assert ours.entropy is None and asked.entropy is not None
    for name, a, b in zip(LinearResult._fields, ours, asked, strict=True):
        assert name == "entropy" or torch.equal(a, b), name
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(camkd_linear_loss, backend="aot_eager", fullgraph=True)
        arguments = (case.hidden, case.head, case.teacher_hidden, case.teacher_heads, case.target)
        out = function(*arguments, student_bias=case.bias, teacher_biases=case.teacher_biases, **case.options)
        assert out.entropy is None and torch.equal(out.loss, ours.loss)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("lead", [(4, 15), (3, 4, 5), (60,)])
def test_leading_dimensions(lead: tuple[int, ...], reduction: str) -> None:
    case = make_linear_case(60, 30, lead=lead, ignored=0.3, reduction=reduction, hard_weight=1.0)
    ours = assert_rule(case, torch.randn(lead) if reduction == "none" else None, chunk_rows=7)
    assert ours.weights.shape == (2, *lead) and ours.entropy is not None and ours.entropy.shape == lead


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_row_without_leading_dimensions(reduction: str) -> None:
    row, whole = make_linear_case(1, 30, lead=(), reduction=reduction), make_linear_case(1, 30, reduction=reduction)
    ours, expected = run(row), run(whole)
    assert ours.weights.shape == (2,) and ours.entropy is not None and ours.entropy.shape == ()
    for name, a, b in zip(LinearResult._fields, ours, expected, strict=True):
        assert torch.equal(a.reshape(-1), b.reshape(-1)), name


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
    assert ours.entropy is not None
    assert not ours.grad_hidden[ignored].any() and not ours.entropy[ignored].any()


# --- numerics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_valid", [None, 0, 3])
@pytest.mark.parametrize(
    "weighting", ["confidence", torch.ones(1), torch.ones(1, 2, 0)], ids=["name", "(1,)", "(1, 2, 0)"]
)
def test_shift_of_sequences_without_a_position(weighting: Any, num_valid: int | None) -> None:
    hidden = torch.randn(2, 0, 4, requires_grad=True)
    head, target = torch.randn(7, 4, requires_grad=True), torch.zeros(2, 0, dtype=torch.int64)
    settings = {"weighting": weighting, "num_valid": num_valid, "reduction": "none", "shift": True}
    out = camkd_linear_loss(hidden, head, [hidden.detach()], [head.detach()], target, **settings)
    out.loss.sum().backward()
    assert out.loss.numel() == 0 and hidden.grad.shape == hidden.shape and not head.grad.any()


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
