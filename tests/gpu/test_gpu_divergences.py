"""What the logit loss has beyond the paper, on the GPU against the float64 truth: both paths of the Triton kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from camkd_fast import camkd_loss
from camkd_fast.backends import dispatch
from camkd_fast.losses.formula import Formula
from tests.support.cases import Case, make_case, on
from tests.support.evaluate import run, run_value_and_grad
from tests.support.gpu import Place
from tests.support.tolerance import assert_accurate, assert_result
from tests.support.truth import entropy, naive, truth

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DIVERGENCES: list[Any] = ["forward_kl", "reverse_kl", ("jsd", 0.3), ("jsd", 0.9), ("skew", 0.1), ("skew", 0.7)]
WIDTHS = (100, 1001, 33000)
MAPS: dict[str, Any] = {
    "student_logit_scale": 0.5,
    "student_softcap": 4.0,
    "teacher_logit_scales": (1.0, 0.25, 2.0),
    "teacher_softcaps": (None, 5.0, None),
}


@pytest.fixture(autouse=True)
def _complete(place: Place) -> None:
    if place.backend in dispatch._BASIC_ONLY:
        pytest.skip(f"backend {place.backend} has the paper's formula only")


def check(place: Place, case: Case, what: str = "") -> None:
    case = on(case, place.device)
    R, N = truth(case), naive(case)
    assert_result(run(case, place.backend), case, R, N, what)
    assert_result(run_value_and_grad(case, place.backend), case, R, N, what)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, 3.0])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_matches_truth(place: Place, divergence: Any, temperature: float, dtype: torch.dtype) -> None:
    """Rows on chip, of odd width, and in blocks of columns; another number of teachers, weighting and layout each."""
    for C, K, weighting, padded in (
        (100, 3, "confidence", False),
        (1001, 2, "entropy", True),
        (33000, 4, "min_ce", False),
    ):
        given = {"divergence": divergence, "temperature": temperature, "weighting": weighting}
        for peaked in (False, True):
            case = make_case(33, C, K, dtype, peaked=peaked, padded=padded, ignored=0.2, **given)
            check(place, case, f"C={C} peaked={peaked}")


@pytest.mark.parametrize("C", WIDTHS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES[:5], ids=str)
def test_all_options_at_once(place: Place, divergence: Any, dtype: torch.dtype, C: int) -> None:
    for two_labels in (False, True):
        case = make_case(
            33, C, 3, dtype, ignored=0.2, temperature=3.0, divergence=divergence, z_loss_weight=0.1,
            scale_by_t2=False, entropy=True, two_labels=two_labels, **MAPS,
        )  # fmt: skip
        check(place, case, f"two labels: {two_labels}")
        moved = on(case, place.device)
        out = camkd_loss(moved.student, moved.teachers, moved.target, backend=place.backend, **moved.options())
        assert out.entropy is not None
        assert_accurate(out.entropy, entropy(moved, torch.float64), entropy(moved, F32), floor=1e-6)


@pytest.mark.parametrize("C", WIDTHS)
@pytest.mark.parametrize("divergence", DIVERGENCES[:5], ids=str)
def test_given_weights_and_many_teachers(place: Place, divergence: Any, C: int) -> None:
    weights = torch.rand(5, 33, generator=torch.Generator().manual_seed(C))
    weights[1] = 0.0
    check(place, make_case(33, C, 5, BF16, ignored=0.2, divergence=divergence, weighting=weights))
    check(place, make_case(9, C, 9, BF16, divergence=divergence, weighting="entropy", temperature=2.5))


@pytest.mark.parametrize("C", [70, 33000])
@pytest.mark.parametrize("divergence", DIVERGENCES[:5], ids=str)
def test_masked_columns(place: Place, divergence: Any, C: int) -> None:
    """In all tensors; then in a teacher of one row, whose reverse KL is infinite and whose gradient is NaN."""
    case = make_case(4, C, 3, padded=False, divergence=divergence, weighting="uniform")
    for z in (case.student, *case.teachers):
        z[:, 4 : C // 2] = float("-inf")
    case = case.with_(target=torch.tensor([3, C - 1, 0, C - 2]))
    for spoiled in (False, True):
        if spoiled:
            case.teachers[1][1, C - 5] = float("-inf")
        moved = on(case, place.device)
        exact = moved.with_(student=moved.student.double(), teachers=tuple(z.double() for z in moved.teachers))
        actual = run(moved, place.backend)
        assert_result(actual, moved, run(exact, "reference"), run(moved, "reference"))
        assert actual.grad[1].isnan().all() == (spoiled and divergence == "reverse_kl")


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("C", [10, 100, 1000, 4096, 33000])
@pytest.mark.parametrize("divergence", DIVERGENCES[:5], ids=str)
def test_a_gradient_in_the_students_memory(place: Place, divergence: Any, C: int, dtype: torch.dtype) -> None:
    """Repeated: the threads of a row may not read what another one has written, in any order."""
    module = dispatch._module(place.backend)
    formula = Formula(divergence=divergence, student_softcap=5.0, z_loss_weight=0.1).checked(2)
    case = on(make_case(65, C, 2, dtype, padded=False, ignored=0.2), place.device)
    expected = module.row_loss(case.student, case.teachers, case.target, formula, needs_grad=True)
    for _ in range(5):
        student = case.student.clone()
        ours = module.row_loss(student, case.teachers, case.target, formula, needs_grad=True, out=student)
        assert torch.equal(student, expected.grad_student) and torch.equal(ours.row_stats, expected.row_stats)
