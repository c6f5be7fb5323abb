"""The row op of rows whose columns are spread over processes: whatever the shards, it is that of whole rows."""

from __future__ import annotations

import importlib
import inspect
import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camkd_fast.backends import dispatch
from camkd_fast.backends.contract import LABEL, ShardBackend
from camkd_fast.backends.row_sums import merged
from camkd_fast.backends.row_sums import row_sums as reference_sums
from camkd_fast.losses.formula import Formula
from tests.support.backends import BACKENDS
from tests.support.cases import make_case
from tests.support.row_contract import assert_agrees
from tests.support.shards import in_shards
from tests.support.tolerance import assert_near

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
INF, NAN = float("inf"), float("nan")
DIVERGENCES: list[Any] = ["forward_kl", "reverse_kl", ("jsd", 0.3), ("skew", 0.1)]
WEIGHTINGS = ("confidence", "uniform", "entropy", "min_ce", "given")
BOUNDS = {40: [(0, 40), (0, 1, 17, 40), (0, 13, 26, 39, 40)], 5003: [(0, 2000, 5003), (0, 5002, 5003)]}
# Numpy warns where a masked lane or an ignored row computes inf - inf, which reaches no result.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def backend_of(name: str) -> Any:
    if name == "triton":
        pytest.importorskip("triton")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("these cases are CPU tensors, which need TRITON_INTERPRET=1")
    return importlib.import_module(dispatch._OF_SHARDS[name])


NAMES = (*BACKENDS, "triton")


@pytest.mark.parametrize("function", [name for name in vars(ShardBackend) if not name.startswith("_")])
@pytest.mark.parametrize("name", dispatch.BACKENDS)
def test_signatures(name: str, function: str) -> None:
    if name == "triton":
        pytest.importorskip("triton")
    if name in ("cpu", "cuda") and "cpu" not in BACKENDS:
        pytest.skip("a build without the compiled module")
    module = importlib.import_module(dispatch._OF_SHARDS[name])
    wanted = list(inspect.signature(getattr(ShardBackend, function)).parameters.values())[1:]
    given = list(inspect.signature(getattr(module, function)).parameters.values())
    assert [(p.name, p.kind, p.default) for p in given] == [(p.name, p.kind, p.default) for p in wanted]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.3])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_divergence_weighting_and_temperature(
    name: str, divergence: Any, weighting: str, temperature: float
) -> None:
    i = WEIGHTINGS.index(weighting)
    peaked, dtype, K = i % 2 == 0 and weighting != "entropy", (F32, BF16, F16, F32, F32)[i], (3, 2, 4, 5, 3)[i]
    case = make_case(12, 40, K, dtype, peaked=peaked, ignored=0.2)
    options: dict[str, Any] = {
        "temperature": temperature, "divergence": divergence, "weighting": weighting, "hard_weight": 0.5,
        "z_loss_weight": 0.1 * (i % 2), "scale_by_t2": i % 3 > 0, "student_softcap": 6.0 if i == 3 else None,
        "teacher_logit_scales": (0.5,) * K if i == 3 else None,
    }  # fmt: skip
    if weighting == "given":
        options["weighting"] = torch.tensor([[0.2], [0.0], [0.9]]).expand(3, 12)
    bounds = BOUNDS[40][i % 3]
    assert_agrees(in_shards(backend_of(name), bounds), case.student, list(case.teachers), case.target, **options)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("bounds", BOUNDS[5003], ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_wide_rows(name: str, bounds: tuple[int, ...], divergence: Any) -> None:
    """Several blocks of columns, one row after another and all threads on one row."""
    for N in (1, 9):
        case = make_case(N, 5003, 3, peaked=True)
        shards = in_shards(backend_of(name), bounds)
        assert_agrees(shards, case.student, list(case.teachers), case.target, divergence=divergence, hard_weight=0.5)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_masked_shards(name: str, divergence: Any) -> None:
    """Shards without a finite logit of the student, of a teacher or of both; labels there, too."""
    student, *teachers = (torch.randn(9, 40, generator=torch.Generator().manual_seed(k)) for k in range(3))
    student[0, 13:26], teachers[0][1, :13], teachers[1][2, 13:26], teachers[1][8, :13] = -INF, -INF, -INF, -INF
    for z in (student, *teachers):
        z[3, 26:39], z[4, :39], z[5, :13] = -INF, -INF, -1e30
    # A shard of probability 0, where the student has none at all
    teachers[0][7, 13:26], student[7, 14] = -1e5, -INF
    target = torch.tensor([14, 3, 20, 27, 39, 4, -100, 39, 30])
    assert_agrees(
        in_shards(backend_of(name), BOUNDS[40][2]), student, teachers, target, divergence=divergence, temperature=2.0
    )


@pytest.mark.parametrize("name", NAMES)
def test_labels_of_no_shard(name: str) -> None:
    """NaN where nobody has the label, as for whole rows; ignored rows may hold anything."""
    student, *teachers = (torch.randn(5, 40, generator=torch.Generator().manual_seed(k)) for k in range(3))
    student[1], teachers[0][1] = NAN, INF
    for ignore_index in (-100, 3, -1):
        target = torch.tensor([40, ignore_index, 7, -5, 39])
        shards = in_shards(backend_of(name), BOUNDS[40][1])
        for weighting in ("confidence", "uniform"):
            assert_agrees(shards, student, teachers, target, ignore_index=ignore_index, weighting=weighting)


@pytest.mark.parametrize("name", NAMES)
def test_entropies_of_the_student(name: str) -> None:
    """At T; row_stats end with them."""
    case = make_case(12, 40, 2, padded=False)
    formula = Formula(temperature=2.5, entropy=True).checked(2)
    found = in_shards(backend_of(name), BOUNDS[40][1])(
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
    backend, case = backend_of(name), make_case(6, 40, 2, padded=False)
    teachers = list(case.teachers)
    for scale in (0.25, torch.tensor([0.25])):
        plain = in_shards(backend, (0, 40))
        assert_agrees(plain, case.student, teachers, case.target, grad_scale=scale)

    def in_place(student: torch.Tensor, *others: Any, **options: Any) -> Any:
        return in_shards(backend, (0, 40))(copy := student.clone(), *others, out=copy, **options)

    for divergence in DIVERGENCES:
        assert_agrees(in_place, case.student, teachers, case.target, divergence=divergence, student_softcap=5.0)


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
