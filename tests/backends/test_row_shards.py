"""The row op of rows whose columns are spread over processes: whatever the shards, it is that of whole rows."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camkd_fast.backends import dispatch
from camkd_fast.backends.contract import LABEL
from camkd_fast.backends.row_sums import merged
from camkd_fast.backends.row_sums import row_sums as reference_sums
from camkd_fast.losses.formula import Formula
from tests.support import shards
from tests.support.backends import BACKENDS
from tests.support.cases import make_case
from tests.support.row_contract import assert_agrees
from tests.support.shards import BF16, DIVERGENCES, F16, F32, FOUR, UNEVEN, WEIGHTINGS, in_shards
from tests.support.tolerance import assert_near

# Numpy warns where a masked lane or an ignored row computes inf - inf, which reaches no result.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def backend_of(name: str) -> Any:
    if name == "triton":
        pytest.importorskip("triton")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("these cases are CPU tensors, which need TRITON_INTERPRET=1")
    return importlib.import_module(dispatch._OF_SHARDS[name])


NAMES = (*BACKENDS, "triton")


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.3])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_divergence_weighting_and_temperature(
    name: str, divergence: Any, weighting: str, temperature: float
) -> None:
    bounds = (UNEVEN, FOUR)[WEIGHTINGS.index(weighting) % 2]
    shards.check_formula(backend_of(name), bounds, divergence, weighting, temperature)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("bounds", [(0, 2000, 5003), (0, 5002, 5003)], ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_wide_rows(name: str, bounds: tuple[int, ...], divergence: Any) -> None:
    """Several blocks of columns, one row after another and all threads on one row."""
    for N in (1, 9):
        case = make_case(N, 5003, 3, peaked=True)
        row_loss = in_shards(backend_of(name), bounds)
        assert_agrees(row_loss, case.student, list(case.teachers), case.target, divergence=divergence, hard_weight=0.5)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_masked_shards(name: str, divergence: Any) -> None:
    shards.check_masked_shards(backend_of(name), divergence)


def test_formulas_of_the_same_sums_share_a_launcher() -> None:
    """The sums do not depend on the weights of the losses, and of the weightings on that by entropies only."""
    backend_of("triton")
    from camkd_fast.kernels.row_shards import row_sums, sums_launcher

    case = make_case(3, 40, 2)
    formula = Formula().checked(2)

    def sums(**changes: Any) -> torch.Tensor:
        return row_sums(case.student, list(case.teachers), case.target, formula.replaced(**changes))

    sums_launcher.cache_clear()
    first = sums()
    for changes in ({"hard_weight": 0.0, "soft_weight": 3.0}, {"scale_by_t2": False}, {"z_loss_weight": 0.1}):
        assert torch.equal(sums(**changes), first)
    assert torch.equal(sums(weighting="min_ce"), first)
    assert sums_launcher.cache_info().misses == 1
    sums(weighting="entropy")
    assert sums_launcher.cache_info().misses == 2


@pytest.mark.parametrize("name", NAMES)
def test_labels_of_no_shard(name: str) -> None:
    shards.check_labels_of_no_shard(backend_of(name))


@pytest.mark.parametrize("name", NAMES)
def test_entropies_of_the_student(name: str) -> None:
    """At T; row_stats end with them."""
    case = make_case(12, 40, 2, padded=False)
    formula = Formula(temperature=2.5, entropy=True).checked(2)
    found = in_shards(backend_of(name), UNEVEN)(
        case.student, list(case.teachers), case.target, formula, needs_grad=False
    )
    log_q = (case.student.double() / 2.5).log_softmax(-1)
    assert found.entropy is not None
    assert_near(found.entropy, -(log_q.exp() * log_q).sum(-1).float(), 1e-6)


def test_a_label_in_several_shards_is_no_label() -> None:
    formula, student = Formula().checked(1), torch.randn(3, 40)
    of_one = reference_sums(student, [student], torch.tensor([1, 5, 39]), formula)
    elsewhere = reference_sums(student, [student], torch.tensor([-1, 5, -1]), formula)
    sums, owners = merged(torch.stack([of_one, elsewhere]), formula)
    assert owners.tolist() == [1, 2, 1] and sums[:, LABEL].isnan().all(0).tolist() == [False, True, False]


@pytest.mark.parametrize("name", NAMES)
def test_gradient_in_place_and_its_scale(name: str) -> None:
    shards.check_gradient_in_place(backend_of(name))


@pytest.mark.parametrize("name", BACKENDS)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_shards(name: str, data: st.DataObject) -> None:
    C = data.draw(st.integers(1, 90), label="C")
    cuts = data.draw(st.lists(st.integers(1, max(C - 1, 1)), max_size=4, unique=True), label="cuts") if C > 1 else []
    dtype = data.draw(st.sampled_from([F32, BF16, F16]), label="dtype")
    N, K = data.draw(st.integers(1, 9), label="N"), data.draw(st.integers(1, 4), label="K")
    case = make_case(N, C, K, dtype, ignored=0.3, seed=data.draw(st.integers(0, 99)))
    assert_agrees(
        in_shards(backend_of(name), (0, *sorted(cuts), C)),
        case.student,
        list(case.teachers),
        case.target,
        divergence=data.draw(st.sampled_from(DIVERGENCES), label="divergence"),
        weighting=data.draw(st.sampled_from(["confidence", "uniform", "min_ce"]), label="weighting"),
        temperature=data.draw(st.sampled_from([1.0, 2.0, 4.0, 2.7]), label="T"),
        z_loss_weight=data.draw(st.sampled_from([0.0, 0.1]), label="z"),
    )
