"""Formulas beyond the paper's on the GPU, and gradients in the student's memory.

Dtypes, temperatures, weightings and layouts rotate over the cells, as Triton compiles each kind of call.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from camkd_fast import camkd_loss
from camkd_fast.backends import dispatch
from tests.losses.test_divergences import DIVERGENCES, INF, MASKS, OTHERS, maps_of, masked
from tests.support.cases import Case, make_case, on
from tests.support.evaluate import run, run_value_and_grad
from tests.support.gpu import Place
from tests.support.row_contract import options
from tests.support.tolerance import assert_accurate, assert_result
from tests.support.truth import entropy, naive, truth

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16)
WIDTHS = (37, 400, 4096, 32000, 128256)
TEMPERATURES = (1.0, 2.0, 4.0, 3.3)
WEIGHTINGS = ("confidence", "uniform", "entropy", "min_ce", "given")
CELLS = list(product(DIVERGENCES, WIDTHS))


def cell(i: int) -> Case:
    """Case number i of CELLS."""
    divergence, C = CELLS[i]
    K, weighting = 1 + i % 5, WEIGHTINGS[i % 5]
    return make_case(
        9,
        C,
        K,
        DTYPES[i % 3],
        padded=i % 7 > 3,
        ignored=0.2,
        two_labels=i % 4 == 1,
        divergence=divergence,
        temperature=TEMPERATURES[i % 4],
        weighting=torch.rand(K, 9) if weighting == "given" else weighting,
        scale_by_t2=i % 3 > 0,
        z_loss_weight=0.01 * (i % 2),
        **(maps_of(K) if i % 2 else {}),
    )


@pytest.mark.parametrize("i", range(len(CELLS)), ids=lambda i: "-".join(str(part) for part in CELLS[i]))
def test_every_divergence_and_width(place: Place, i: int) -> None:
    case = on(cell(i), place.device)
    R, N = truth(case), naive(case)
    assert_result(run(case, place.backend), case, R, N)
    assert_result(run_value_and_grad(case, place.backend), case, R, N)


@pytest.mark.parametrize("C", WIDTHS)
@pytest.mark.parametrize("divergence", DIVERGENCES[:5], ids=str)
def test_entropies(place: Place, divergence: Any, C: int) -> None:
    case = make_case(9, C, 2, F32, ignored=0.2, temperature=2.0, divergence=divergence, entropy=True)
    case = on(case, place.device)
    ours = camkd_loss(case.student, case.teachers, case.target, backend=place.backend, **case.options()).entropy
    assert ours is not None
    assert_accurate(ours, entropy(case, torch.float64), entropy(case, F32), floor=1e-6)


@pytest.mark.parametrize("C", [70, 5000])
@pytest.mark.parametrize("divergence", OTHERS, ids=str)
def test_columns_without_probability(place: Place, divergence: Any, C: int) -> None:
    case = make_case(6, C, 2, divergence=divergence).with_(target=torch.zeros(6, dtype=torch.int64))
    for student, teachers in MASKS:
        ours = run(on(masked(case, slice(C // 2, None), student, teachers), place.device), place.backend)
        assert ours.loss.isfinite() and ours.grad.isfinite().all() and not ours.grad[:, C // 2 :].any()
    only_teachers = run(on(masked(case, slice(C // 2, None), teachers=-INF), place.device), place.backend)
    infinite = divergence == "reverse_kl"
    assert bool(only_teachers.divergence.isinf().all()) == infinite
    assert bool(only_teachers.grad.isnan().all()) == infinite


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", [37, 2101, 32000])
@pytest.mark.parametrize("divergence", DIVERGENCES[:5], ids=str)
def test_a_gradient_in_the_students_memory(place: Place, divergence: Any, C: int, dtype: torch.dtype) -> None:
    """With more rows than a GPU has blocks; the paper's formula too."""
    case = on(make_case(3000 if place.real else 30, C, 2, dtype, padded=False, ignored=0.2), place.device)
    backend = dispatch.backend_for(place.backend, [case.student])
    given = options(divergence=divergence)
    expected = backend.row_loss(case.student, case.teachers, case.target, **given)
    student = case.student.clone()
    ours = backend.row_loss(student, case.teachers, case.target, out=student, **given)
    assert ours.grad_student is student and expected.grad_student is not None
    assert torch.equal(student, expected.grad_student) and torch.equal(ours.row_stats, expected.row_stats)
