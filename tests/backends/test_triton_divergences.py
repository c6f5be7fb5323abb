"""What the Triton kernels have beyond the paper's formula, under the interpreter: both paths, for the same small rows.

tests/losses/test_divergences.py has the shipped launches of the same formulas, and identities between them.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest
import torch

from camkd_fast import camkd_loss
from camkd_fast.backends import reference
from camkd_fast.losses.formula import Formula
from tests.support.cases import Case, make_case
from tests.support.evaluate import run
from tests.support.row_contract import assert_agrees, options
from tests.support.tolerance import assert_accurate, assert_near, assert_result, truncated
from tests.support.truth import entropy, naive, truth

pytest.importorskip("triton")
kernels = importlib.import_module("camkd_fast.kernels")

if os.environ.get("TRITON_INTERPRET") != "1":  # set by conftest.py without a GPU; with one tests/gpu runs
    pytest.skip("these cases are CPU tensors, which need TRITON_INTERPRET=1", allow_module_level=True)

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAN, INF = float("nan"), float("inf")
WEIGHTINGS = ("confidence", "entropy", "uniform", "min_ce", "given")
OTHERS: list[Any] = ["reverse_kl", ("jsd", 0.3), ("skew", 0.1)]
MAPS: dict[str, Any] = {
    "student_logit_scale": 0.5,
    "student_softcap": 4.0,
    "teacher_logit_scales": (1.0, 0.25, 2.0),
    "teacher_softcaps": (None, 5.0, None),
}
# Numpy warns where a masked lane or an ignored row computes inf - inf, which reaches no result.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def check(case: Case, what: str = "") -> None:
    actual, R, N = run(case, "triton"), truth(case), naive(case)
    R, N = (result._replace(grad=truncated(result.grad, case.student.dtype)) for result in (R, N))
    assert_result(actual, case, R, N, what)


@pytest.mark.slow  # a second per evaluation; tests/losses/test_divergences.py has a share of them
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("divergence", OTHERS, ids=str)
def test_every_weighting(regime: str, divergence: Any, weighting: str) -> None:
    """Another temperature and dtype for each, so that all temperatures meet all divergences."""
    i = WEIGHTINGS.index(weighting)
    T, dtype = (1.0, 2.0, 4.0, 2.5, 1.5)[i], (F32, F32, BF16, F16, F32)[i]
    case = make_case(
        12, 72, 3, dtype, peaked=i % 2 == 1, ignored=0.2, temperature=T, weighting=weighting, divergence=divergence
    )
    if weighting == "given":
        case = case.with_(weighting=torch.tensor([[0.2], [0.0], [0.9]]).expand(3, 12).contiguous())
    check(case, f"{regime} {weighting}")


def test_min_ce_of_the_papers_divergence(regime: str) -> None:
    check(make_case(12, 72, 3, peaked=True, ignored=0.2, weighting="min_ce", hard_weight=0.5), regime)


def test_lowest_cross_entropies(regime: str) -> None:
    """The first of equal ones, of infinite ones too."""
    student, teachers = torch.randn(4, 40), [torch.randn(4, 40) for _ in range(2)]
    target = torch.tensor([3, 5, 7, 9])
    for z in teachers:
        z[2, 7] = -INF
    teachers = [teachers[0], teachers[1], teachers[0], teachers[1]]
    for divergence in ("forward_kl", ("skew", 0.5)):
        assert_agrees(kernels.row_loss, student, teachers, target, weighting="min_ce", divergence=divergence)


@pytest.mark.slow  # a second per evaluation; tests/losses/test_divergences.py has a share of them
@pytest.mark.parametrize("divergence", ["forward_kl", *OTHERS], ids=str)
def test_all_options_at_once(regime: str, divergence: Any) -> None:
    """Maps of every sort, z-loss, entropies, no T^2, two labels; rows of odd width."""
    case = make_case(
        12, 41, 3, ignored=0.2, temperature=3.0, divergence=divergence, z_loss_weight=0.3, scale_by_t2=False,
        hard_weight=0.7, two_labels=True, entropy=True, **MAPS,
    )  # fmt: skip
    check(case, regime)
    ours = camkd_loss(case.student, case.teachers, case.target, backend="triton", **case.options()).entropy
    assert ours is not None
    assert_accurate(ours, entropy(case, torch.float64), entropy(case, F32), floor=1e-6)


@pytest.mark.parametrize("of", ["student_logit_scale", "teacher_logit_scales"])
def test_scales_without_a_softcap(regime: str, of: str) -> None:
    scales = {"student_logit_scale": 0.25, "teacher_logit_scales": (1.0, 2.0)}
    check(make_case(12, 40, 2, **{of: scales[of]}), f"{regime} {of}")


@pytest.mark.parametrize(("scale", "softcap"), [(1e-3, 5.0), (1.0, 5.0), (30.0, 5.0), (1.0, 1e4)])
def test_a_softcap_near_0_and_far_beyond_it(regime: str, scale: float, softcap: float) -> None:
    """tanh of tiny numbers, and derivatives of 1e-15, each to a relative error."""
    student, teacher, target = scale * torch.randn(4, 40), torch.randn(4, 40), torch.tensor([3, 5, 7, 9])
    formula = Formula(2.0, 0.7, 1.0, "uniform", z_loss_weight=0.1)
    capped = formula._replace(student_softcap=softcap)
    ours = kernels.row_loss(student, [teacher], target, capped, needs_grad=True).grad_student
    inner = student.double() / softcap
    logits = softcap * inner.tanh()
    by_logits = reference.row_loss(logits, [teacher.double()], target, formula, needs_grad=True).grad_student
    # Not by 1 - tanh^2, which cancels in float64 too.
    slopes = inner.cosh().square().reciprocal()
    assert ((ours - by_logits * slopes).abs() <= 2e-5 * by_logits.abs().amax(1, keepdim=True) * slopes).all()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("divergence", OTHERS, ids=str)
def test_masked_columns(regime: str, divergence: Any, temperature: float) -> None:
    """The first block of columns and parts of others, in all, in some and in one of the tensors."""
    student, teachers = torch.randn(4, 70), [3 * torch.randn(4, 70) for _ in range(3)]
    target = torch.tensor([43, 69, 50, 60])
    for tensor in (student, *teachers):
        tensor[:, :40] = -INF
    given = {"divergence": divergence, "temperature": temperature, "entropy": True}
    assert_agrees(kernels.row_loss, student, teachers, target, **given)
    student[0, 67] = -INF  # a column of the teachers only
    assert_agrees(kernels.row_loss, student, teachers, target, **given)
    teachers[1][1, 65] = teachers[2][2, 45:60] = -INF  # of the student: infinite reverse KLs, NaN in those gradients
    assert_agrees(kernels.row_loss, student, teachers, target, **given)
    assert_agrees(kernels.row_loss, student, teachers, target, **given, soft_weight=0.0)
    weights = torch.tensor([[1.0], [0.0], [0.5]]).expand(3, 4)
    assert_agrees(kernels.row_loss, student, teachers, target, **given, weighting=weights)


@pytest.mark.parametrize("divergence", OTHERS, ids=str)
def test_blocks_masked_with_the_lowest_number(regime: str, divergence: Any) -> None:
    student, teachers = torch.randn(4, 70), [3 * torch.randn(4, 70) for _ in range(2)]
    for tensor in (student, *teachers):
        tensor[:, :40] = torch.finfo(F32).min
    assert_agrees(
        kernels.row_loss, student, teachers, torch.tensor([43, 69, 50, 60]), divergence=divergence, entropy=True
    )


def test_an_infinite_divergence_of_a_teacher_that_weighs_0(regime: str) -> None:
    """An infinite cross-entropy among others: confidence gives it weight 0, whatever its divergence is."""
    student, teachers = torch.randn(3, 40), [torch.randn(3, 40) for _ in range(3)]
    teachers[1][0, 3] = -INF
    assert_agrees(kernels.row_loss, student, teachers, torch.tensor([3, 5, 7]), divergence="reverse_kl")


@pytest.mark.parametrize("divergence", OTHERS, ids=str)
def test_teachers_of_nan(regime: str, divergence: Any) -> None:
    """Their rows are NaN, unless their weight is 0 or nobody asks for the soft loss."""
    student, teachers, target = torch.randn(2, 40), [torch.randn(2, 40) for _ in range(2)], torch.tensor([3, 5])
    teachers[1][0] = NAN
    spoiled = kernels.row_loss(student, teachers, target, **options(divergence=divergence, weighting="uniform"))
    assert spoiled.row_stats[0].isnan().tolist() == [True, False]
    assert spoiled.grad_student[0].isnan().all() and spoiled.grad_student[1].isfinite().all()
    weights = torch.tensor([[0.5], [0.0]]).expand(2, 2)
    ours = kernels.row_loss(student, teachers, target, **options(divergence=divergence, weighting=weights))
    expected = kernels.row_loss(student, teachers[:1], target, **options(divergence=divergence, weighting=weights[:1]))
    assert_near(ours.row_stats[:3], expected.row_stats[:3])
    assert_near(ours.grad_student, expected.grad_student)
    unused = options(divergence=divergence, weighting="uniform", soft_weight=0.0)
    assert kernels.row_loss(student, teachers, target, **unused).grad_student.isfinite().all()


@pytest.mark.parametrize("divergence", OTHERS, ids=str)
def test_large_offsets_do_not_cancel(regime: str, divergence: Any) -> None:
    student, *teachers = ((32 * torch.randn(3, 70)).round() / 32 for _ in range(3))
    target, given = torch.tensor([3, 69, 0]), options(divergence=divergence, entropy=True)
    one = kernels.row_loss(student, teachers, target, **given)
    moved = kernels.row_loss(student + 1e4, [z - 3e4 for z in teachers], target, **given)
    assert torch.equal(one.row_stats, moved.row_stats) and torch.equal(one.grad_student, moved.grad_student)
