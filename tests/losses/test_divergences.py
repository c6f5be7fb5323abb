"""What the logit loss has beyond the paper: divergences, min_ce, z-loss, logit scales and softcaps, entropies."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.autograd import gradcheck

from camkd_fast import CAMKDLoss, camkd_loss, camkd_loss_and_grad
from camkd_fast.backends.dispatch import availability, interpreting
from tests.support.backends import BACKENDS as USABLE
from tests.support.cases import Case, make_case
from tests.support.converged import assert_rows, nearly_certain
from tests.support.evaluate import fields, run, run_value_and_grad
from tests.support.tolerance import assert_accurate, assert_near, assert_result, truncated
from tests.support.truth import entropy, naive, truth

INF = float("inf")
TESTED = [name for name in USABLE if name in ("reference", "cpu")]
if interpreting() and availability("triton").usable:
    TESTED.append("triton")
SHARE_OF_TRITON = 11  # odd, so that the cells that are left have every value of every parameter
DIVERGENCES = ["forward_kl", "reverse_kl", ("jsd", 0.3), ("jsd", 0.9), ("skew", 0.1), ("skew", 0.7)]
OTHERS = [kind for kind in DIVERGENCES if kind != "forward_kl"]
MAPS: dict[str, Any] = {"student_logit_scale": 0.5, "student_softcap": 4.0}


def maps_of(K: int) -> dict[str, Any]:
    """Scales and softcaps of the student and of K teachers, some without."""
    scales = tuple((1.0, 0.25, 2.0)[k % 3] for k in range(K))
    return {**MAPS, "teacher_logit_scales": scales, "teacher_softcaps": tuple((None, 5.0)[k % 2] for k in range(K))}


def with_backends(*parameters: list[Any]) -> list[tuple[Any, ...]]:
    """Every cell of a grid with every backend.

    Triton's interpreter takes up to a second per evaluation and gets one cell in SHARE_OF_TRITON; the cells of both its
    paths are in tests/backends/test_triton_divergences.py.
    """
    cells = list(product(*parameters))
    return [(*cell, name) for name in TESTED for cell in cells[:: SHARE_OF_TRITON if name == "triton" else 1]]


def assert_rule(case: Case, backend: str, grad_output: torch.Tensor | None = None) -> None:
    R, N = truth(case, grad_output), naive(case, grad_output)
    if backend == "triton":  # its interpreter does not round
        R, N = (result._replace(grad=truncated(result.grad, case.student.dtype)) for result in (R, N))
    assert_result(run(case, backend, grad_output), case, R, N, "loss")
    if grad_output is None:
        assert_result(run_value_and_grad(case, backend), case, R, N, "value and gradient")


# --- values and gradients --------------------------------------------------------------------------------------------


SHAPES = [(37, 10, 3), (64, 100, 1), (9, 1000, 2), (5, 5000, 4)]


@pytest.mark.parametrize(
    ("shape", "divergence", "temperature", "peaked", "backend"),
    with_backends(SHAPES, DIVERGENCES, [1.0, 2.0, 4.0, 3.0], [False, True]),
    ids=str,
)
def test_the_formulas(
    shape: tuple[int, int, int], divergence: Any, temperature: float, peaked: bool, backend: str
) -> None:
    case = make_case(*shape, peaked=peaked, ignored=0.2, divergence=divergence, temperature=temperature)
    assert_rule(case, backend)


OPTIONS: list[dict[str, Any]] = [
    {"weighting": "min_ce"},
    {"weighting": "entropy", "temperature": 3.0},
    {"scale_by_t2": False},
    {"z_loss_weight": 0.01, "reduction": "sum"},
    {"z_loss_weight": -0.5, "hard_weight": 0.0},
    {"hard_weight": 0.0, "soft_weight": 0.5, "num_items": 7},
    maps_of(3),
    {**maps_of(3), "z_loss_weight": 0.1, "weighting": "entropy", "temperature": 1.0},
]


@pytest.mark.parametrize(
    ("divergence", "options", "dtype", "backend"),
    with_backends(DIVERGENCES[:5], OPTIONS, [torch.float32, torch.bfloat16, torch.float16]),
    ids=str,
)
def test_with_other_options(divergence: Any, options: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    assert_rule(make_case(37, 150, 3, dtype, ignored=0.2, divergence=divergence, **options), backend)


@pytest.mark.parametrize("backend", TESTED)
@pytest.mark.parametrize("divergence", DIVERGENCES[:5], ids=str)
def test_given_weights_learn_from_the_divergence(divergence: Any, backend: str) -> None:
    for shape in ((3,), (3, 37)):
        assert_rule(make_case(37, 50, 3, divergence=divergence, weighting=torch.rand(shape)), backend)


@pytest.mark.parametrize("backend", TESTED)
@pytest.mark.parametrize("divergence", DIVERGENCES[:5], ids=str)
def test_a_loss_for_each_token_and_two_labels(divergence: Any, backend: str) -> None:
    case = make_case(24, 65, lead=(4, 6), ignored=0.2, reduction="none", two_labels=True, divergence=divergence)
    assert_rule(case.with_(**maps_of(3)), backend, torch.randn(4, 6))


@pytest.mark.skipif("cpu" not in USABLE, reason="no compiled module")
@pytest.mark.parametrize("rows", [1, 2, 40])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_threads_share_rows_and_columns(divergence: Any, rows: int) -> None:
    """One wide row is shared by the threads, which reduce their sums; many rows are not."""
    case = make_case(rows, 40_001, 2, divergence=divergence, temperature=1.0, z_loss_weight=0.01, entropy=True)
    assert_rule(case, "cpu")
    for T in (1.0, 3.0):
        warm = case.with_(temperature=T)
        ours = camkd_loss(warm.student, warm.teachers, warm.target, backend="cpu", **warm.options()).entropy
        assert ours is not None
        assert_accurate(ours, entropy(warm, torch.float64), entropy(warm, torch.float32), floor=1e-6)


@st.composite
def settings_of_a_call(draw: Any) -> Case:
    C, K = draw(st.one_of(st.integers(1, 40), st.sampled_from([127, 2049, 4097]))), draw(st.integers(1, 6))
    some = draw(st.booleans())
    return make_case(
        draw(st.integers(1, 9)),
        C,
        K,
        draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        peaked=draw(st.booleans()),
        ignored=draw(st.sampled_from([0.0, 0.3, 1.0])),
        seed=draw(st.integers(0, 1000)),
        two_labels=draw(st.booleans()),
        divergence=draw(st.sampled_from(DIVERGENCES)),
        temperature=draw(st.one_of(st.sampled_from([1.0, 2.0, 4.0]), st.floats(0.5, 8.0))),
        weighting=draw(st.sampled_from(["confidence", "uniform", "entropy", "min_ce"])),
        soft_weight=draw(st.sampled_from([0.0, 1.0, 2.0])),
        z_loss_weight=draw(st.sampled_from([0.0, 0.0, 0.1])),
        scale_by_t2=draw(st.booleans()),
        **(maps_of(K) if some else {}),
    )


def assert_close_to_reference(case: Case, backend: str) -> None:
    """Close to the reference in float64, whose own formulas are tested above."""
    wide = case.with_(student=case.student.double(), teachers=tuple(z.double() for z in case.teachers))
    ours = run(case, backend)
    if case.weighting == "min_ce":  # among cross-entropies that differ by rounding only, float32 may take another one
        wide = wide.with_(weighting=ours.weights.double())
    expected = run(wide, "reference")
    for name in ("loss", "hard", "soft", "weights", "teacher_ce", "divergence", "grad"):
        a, b = getattr(ours, name).double(), getattr(expected, name).double()
        size = 1e-30 + float(b.abs().max()) if b.numel() else 1.0
        # Entropies of a certain teacher are rounding errors, and so is their ratio.
        unsure = 1e-2 if case.weighting == "entropy" else 0.0
        eps = torch.finfo(ours.grad.dtype).eps if name == "grad" else 1e-6
        limit = 200 * eps * size + 1e-5 * (1 + case.temperature**2) + unsure * (1 + size)
        assert (a - b).abs().max() <= limit, f"{name}: {(a - b).abs().max()} > {limit}"
    assert (ours.grad[case.target == case.ignore_index] == 0).all()


@pytest.mark.skipif("cpu" not in USABLE, reason="no compiled module")
@settings(max_examples=150)
@given(settings_of_a_call())
def test_any_settings_agree_with_the_reference(case: Case) -> None:
    assert_close_to_reference(case, "cpu")


# --- identities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", TESTED)
def test_the_ends_of_a_range_are_kls(backend: str) -> None:
    case = make_case(30, 40, 2)
    forward, reverse = (run(case.with_(divergence=kind), backend) for kind in ("forward_kl", "reverse_kl"))
    for kind, expected in ((("jsd", 0.0), forward), (("skew", 0.0), forward), (("jsd", 1.0), reverse)):
        ours = run(case.with_(divergence=kind), backend)
        assert torch.equal(ours.loss, expected.loss) and torch.equal(ours.grad, expected.grad)
    near = run(case.with_(divergence=("skew", 1e-6)), backend)
    assert_near(near.divergence, forward.divergence, 1e-4)


@pytest.mark.parametrize("backend", TESTED)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_a_student_equal_to_its_teachers_has_no_divergence(divergence: Any, backend: str) -> None:
    logits = 5 * torch.randn(6, 1000)
    case = Case(logits, (logits, logits), torch.zeros(6, dtype=torch.int64), hard_weight=0.0, divergence=divergence)
    ours = run(case, backend)
    assert ours.divergence.abs().max() < 2e-7 and ours.grad.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("divergence", "temperature", "height", "backend"), with_backends(DIVERGENCES, [1.0, 4.0], [10.0, 20.0, 24.0])
)
def test_nearly_certain_rows(divergence: Any, temperature: float, height: float, backend: str) -> None:
    """At the label the logarithms of two nearly equal probabilities would round to more than a divergence of 1e-9."""
    assert_rows(nearly_certain(height, 200, 3, torch.float32, temperature).with_(divergence=divergence), backend)


@pytest.mark.parametrize("backend", TESTED)
def test_jsd_of_one_half_is_symmetric(backend: str) -> None:
    case = make_case(30, 40, 1, divergence=("jsd", 0.5))
    other = case.with_(student=case.teachers[0], teachers=(case.student,))
    assert_near(run(case, backend).divergence, run(other, backend).divergence, 1e-5)


@pytest.mark.parametrize("backend", TESTED)
def test_min_ce_takes_the_first_of_the_lowest(backend: str) -> None:
    case = make_case(50, 12, 3, padded=False)
    a, b, c = case.teachers
    ours = run(case.with_(teachers=(a, b, a, c, b), weighting="min_ce"), backend)
    lowest = ours.teacher_ce.argmin(0)
    assert torch.equal(ours.weights.sum(0), torch.ones(50)) and not ours.weights[2].any() and not ours.weights[4].any()
    assert torch.equal(ours.weights.argmax(0), torch.where(lowest == 2, 0, torch.where(lowest == 4, 1, lowest)))
    alone = run(case.with_(teachers=(a,), weighting="min_ce"), backend)
    assert torch.equal(alone.weights, torch.ones(1, 50))


@pytest.mark.parametrize("backend", TESTED)
def test_a_map_is_the_loss_of_mapped_logits(backend: str) -> None:
    case = make_case(30, 40, 2, reduction="sum", temperature=2.0)
    student = case.student.detach().requires_grad_()
    mapped = 4.0 * torch.tanh(0.5 * student / 4.0)
    teachers = (2.0 * case.teachers[0], 3.0 * torch.tanh(case.teachers[1] / 3.0))
    expected = camkd_loss(mapped, teachers, case.target, temperature=2.0, reduction="sum", backend=backend)
    expected.loss.backward()
    ours = run(case.with_(**MAPS, teacher_logit_scales=(2.0, 1.0), teacher_softcaps=(None, 3.0)), backend)
    for a, b in zip(fields(expected), ours[:6], strict=True):
        assert_near(b, a.detach())
    assert_near(ours.grad, student.grad)


@pytest.mark.parametrize("backend", TESTED)
def test_softcaps_far_above_the_logits(backend: str) -> None:
    """tanh near 0, where one by the exponential function would cancel."""
    case = make_case(37, 150, 3, student_softcap=1e4, teacher_softcaps=(1e4, None, 3e3), student_logit_scale=0.5)
    assert_rule(case, backend)


# --- edges -----------------------------------------------------------------------------------------------------------


def masked(case: Case, columns: slice, student: float | None = None, teachers: float | None = None) -> Case:
    """Logits of these columns replaced by a number, where one is given."""

    def cut(z: torch.Tensor, logit: float | None) -> torch.Tensor:
        z = z.clone()
        if logit is not None:
            z[:, columns] = logit
        return z

    return case.with_(student=cut(case.student, student), teachers=tuple(cut(z, teachers) for z in case.teachers))


LOWEST = torch.finfo(torch.float32).min
# Of student and teachers in a column that neither gives a probability: all usual ways to mask one.
MASKS = [(-INF, -INF), (-1e30, -INF), (LOWEST, -INF), (-INF, -1e30), (-1e30, LOWEST), (-1e30, -1e30)]


@pytest.mark.parametrize(
    ("divergence", "C", "temperature", "backend"), with_backends(OTHERS, [33, 5000], [1.0, 3.0]), ids=str
)
def test_columns_without_probability(divergence: Any, C: int, temperature: float, backend: str) -> None:
    case = make_case(6, C, 2, divergence=divergence, temperature=temperature)
    case = case.with_(target=torch.zeros(6, dtype=torch.int64))
    expected = run(
        case.with_(student=case.student[:, : C // 2], teachers=tuple(z[:, : C // 2] for z in case.teachers)), backend
    )
    for student, teachers in MASKS[: 2 if backend == "triton" else None]:
        ours = run(masked(case, slice(C // 2, None), student, teachers), backend)
        for a, b in zip(ours[:6], expected[:6], strict=True):
            assert_near(a, b, 1e-5)
        assert_near(ours.grad[:, : C // 2], expected.grad, 1e-5, f"{student}, {teachers}")
        assert not ours.grad[:, C // 2 :].any()

    finite = divergence != "reverse_kl"
    only_teachers = run(masked(case, slice(C // 2, None), teachers=-INF), backend)
    assert bool(only_teachers.divergence.isfinite().all()) == finite
    assert bool(only_teachers.grad.isfinite().all()) == finite
    if not finite:
        assert (only_teachers.divergence == INF).all() and only_teachers.grad.isnan().all()
    only_student = run(masked(case, slice(C // 2, None), student=-INF), backend)
    assert only_student.divergence.isfinite().all() and only_student.grad.isfinite().all()
    assert not only_student.grad[:, C // 2 :].any()


@pytest.mark.parametrize("backend", TESTED)
@pytest.mark.parametrize("divergence", OTHERS, ids=str)
def test_terms_of_weight_0_contribute_nothing(divergence: Any, backend: str) -> None:
    case = make_case(6, 300, 2, divergence=divergence)
    spoiled = case.with_(teachers=(torch.full((6, 300), math.nan), case.teachers[1]))
    ours = run(spoiled.with_(weighting=torch.tensor([0.0, 2.0])), backend)
    expected = run(case.with_(teachers=case.teachers[1:], weighting=torch.tensor([2.0])), backend)
    assert_near(ours.loss, expected.loss)
    assert_near(ours.grad, expected.grad)
    infinite = masked(case, slice(100, 300), teachers=-INF)
    infinite = infinite.with_(soft_weight=0.0, target=torch.zeros(6, dtype=torch.int64))
    assert run(infinite, backend).grad.isfinite().all()


@pytest.mark.parametrize(
    ("divergence", "weighting", "K", "backend"), with_backends(DIVERGENCES, ["confidence", "entropy"], [2, 6])
)
def test_a_soft_loss_of_weight_0_reads_no_teacher(divergence: Any, weighting: str, K: int, backend: str) -> None:
    case = make_case(6, 300, K, divergence=divergence, weighting=weighting, soft_weight=0.0)
    spoiled = case.with_(teachers=(torch.full((6, 300), math.nan), *case.teachers[1:]))
    for evaluate in (run, run_value_and_grad):
        ours, expected = evaluate(spoiled, backend), evaluate(case, backend)
        assert_near(ours.loss, expected.loss)
        assert_near(ours.grad, expected.grad)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_a_soft_loss_of_weight_0_reads_no_teacher_in_a_transform(divergence: Any) -> None:
    case = make_case(6, 30, 2, divergence=divergence, soft_weight=0.0)
    spoiled = (torch.full((6, 30), math.nan), case.teachers[1])

    def loss_of(student: torch.Tensor) -> torch.Tensor:
        return camkd_loss(student, spoiled, case.target, **case.options()).loss

    assert_near(torch.func.grad(loss_of)(case.student), run(case, "reference").grad)


@pytest.mark.parametrize("backend", TESTED)
@pytest.mark.parametrize("divergence", DIVERGENCES[:5], ids=str)
def test_ignored_rows_are_zero_even_if_nan(divergence: Any, backend: str) -> None:
    case = make_case(40, 33, ignored=0.3, divergence=divergence, z_loss_weight=0.1, entropy=True, **maps_of(3))
    excluded = case.target == -100
    spoiled = [z.masked_fill(excluded.unsqueeze(1), math.nan) for z in (case.student, *case.teachers)]
    result = run(case.with_(student=spoiled[0], teachers=tuple(spoiled[1:])), backend)
    for ours, expected in zip(result[:7], run(case, backend)[:7], strict=True):
        assert torch.equal(ours, expected)
    out = camkd_loss(spoiled[0], spoiled[1:], case.target, backend=backend, **case.options())
    assert out.entropy is not None and not out.entropy[excluded].any() and (out.entropy[~excluded] > 0).all()


@pytest.mark.parametrize("backend", TESTED)
@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)], ids=str)
def test_min_ce_of_a_nan_is_nan(which: tuple[int, ...], backend: str) -> None:
    """As with the other rules: a teacher that overflows does not end the distillation in silence."""
    case = make_case(6, 30, 2, weighting="min_ce", reduction="none")
    for k in which:
        case.teachers[k][2, 4] = math.nan
    result = run(case, backend, torch.ones(6))
    assert result.weights[:, 2].isnan().all() and result.loss[2].isnan() and result.grad[2].isnan().any()
    others = [0, 1, 3, 4, 5]
    assert result.loss[others].isfinite().all() and result.grad[others].isfinite().all()


@pytest.mark.parametrize("backend", TESTED)
@pytest.mark.parametrize(
    "divergence", [("jsd", 0.999), ("jsd", 1e-3), ("jsd", 1 - 1e-6), ("skew", 0.99), ("skew", 1e-3)], ids=str
)
def test_shares_near_the_ends_of_their_range(divergence: Any, backend: str) -> None:
    """1 minus such a share has few digits in float32. Eager PyTorch is no measure: its logarithms have fewer."""
    case = make_case(48, 60, 2, divergence=divergence, temperature=2.0)
    assert_rule(case, backend)
    if backend != "reference":
        student, *teachers = 3 * torch.randn(3, 48, 60)
        found, exact = (
            camkd_loss(s, t, case.target, divergence=divergence, temperature=2.0, backend=name).divergence.double()
            for s, t, name in (
                (student, teachers, backend),
                (student.double(), [z.double() for z in teachers], "reference"),
            )
        )
        assert ((found - exact).abs() <= 5e-6 * exact).all()


@pytest.mark.parametrize("backend", TESTED)
def test_entropies(backend: str) -> None:
    case = make_case(24, 300, lead=(4, 6), ignored=0.2, temperature=3.0, entropy=True)
    given = camkd_loss(case.student, case.teachers, case.target, backend=backend, **case.options())
    assert given.entropy is not None and given.entropy.shape == (4, 6)
    assert_accurate(given.entropy, entropy(case, torch.float64), entropy(case, torch.float32))
    options = case.with_(entropy=False).options()
    assert camkd_loss(case.student, case.teachers, case.target, backend=backend, **options).entropy is None


# --- autograd, torch.compile, modules --------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("options", [{}, {"weighting": "min_ce"}, {**maps_of(2), "z_loss_weight": 0.3}], ids=str)
def test_gradcheck(divergence: Any, options: dict[str, Any]) -> None:
    case = make_case(5, 7, 2, torch.float64, padded=False, divergence=divergence, temperature=1.5, **options)
    student = case.student.requires_grad_()

    def loss(s: torch.Tensor) -> torch.Tensor:
        return camkd_loss(s, case.teachers, case.target, **case.options()).loss

    assert gradcheck(loss, (student,))
    # As an expression of PyTorch operations too, whose derivatives are taken by autograd
    functional = torch.func.grad(lambda s: camkd_loss(s, case.teachers, case.target, **case.options()).loss)
    assert_near(functional(student.detach()), torch.autograd.grad(loss(student), student)[0], 1e-10)


@pytest.mark.parametrize("backend", TESTED)
@pytest.mark.parametrize("divergence", DIVERGENCES[:5], ids=str)
def test_compiled(divergence: Any, backend: str) -> None:
    torch._dynamo.reset()
    case = make_case(20, 30, 2, divergence=divergence, entropy=True, z_loss_weight=0.1, **maps_of(2))

    def both(student: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = camkd_loss(student, case.teachers, case.target, backend=backend, **case.options())
        assert out.entropy is not None
        return out.loss, out.entropy, out.divergence

    student = case.student.detach().requires_grad_()
    expected, ours = both(student), torch.compile(both, backend="aot_eager", fullgraph=True)(student)
    for a, b in zip(ours, expected, strict=True):
        assert_near(a.detach(), b.detach())
    assert_near(*(torch.autograd.grad(x[0], student)[0] for x in (ours, expected)))


def test_the_module_has_them_too() -> None:
    case = make_case(20, 30, 2)
    given = {"divergence": ("skew", 0.2), "scale_by_t2": False, "z_loss_weight": 0.1, "entropy": True, **maps_of(2)}
    module = CAMKDLoss(**given)
    expected, _ = camkd_loss_and_grad(case.student, case.teachers, case.target, **given)
    ours = module(case.student, case.teachers, case.target)
    assert torch.equal(ours.loss, expected.loss) and torch.equal(ours.entropy, expected.entropy)
    assert "divergence=('skew', 0.2)" in repr(module)
    with pytest.raises(ValueError, match="needs its parameter"):
        CAMKDLoss(divergence="jsd")


def test_a_number_per_teacher_is_checked_with_the_logits() -> None:
    case = make_case(4, 10, 3)
    for name in ("teacher_logit_scales", "teacher_softcaps"):
        with pytest.raises(ValueError, match=f"{name} holds 2 numbers, but there are 3 teachers"):
            camkd_loss(case.student, case.teachers, case.target, **{name: (1.0, 2.0)})
