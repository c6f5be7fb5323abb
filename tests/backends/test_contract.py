"""What holds for every backend without running a kernel: signatures, constants, label counting."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch

from camkd_fast.backends import contract, dispatch, reference
from camkd_fast.backends.contract import Backend, ShardBackend
from camkd_fast.losses.formula import WEIGHTINGS, Formula
from tests.support.backends import BACKENDS
from tests.support.cases import make_case
from tests.support.row_contract import assert_agrees, assert_means
from tests.support.tolerance import assert_near

INF = float("inf")
FUNCTIONS, OF_SHARDS = (
    [name for name in vars(protocol) if not name.startswith("_")] for protocol in (Backend, ShardBackend)
)


def module_of(name: str, modules=dispatch._MODULES):
    """A backend's module, which need not be able to run here. Only a build that is meant to lack it is skipped."""
    if name == "triton":
        pytest.importorskip("triton")
    if name in ("cpu", "cuda") and "cpu" not in BACKENDS:
        pytest.skip("a build without the compiled module")
    return importlib.import_module(modules[name])


@pytest.mark.parametrize("function", [*FUNCTIONS, *OF_SHARDS])
@pytest.mark.parametrize("name", dispatch.BACKENDS)
def test_signatures(name, function):
    protocol, modules = (Backend, dispatch._MODULES) if function in FUNCTIONS else (ShardBackend, dispatch._OF_SHARDS)
    wanted = list(inspect.signature(getattr(protocol, function)).parameters.values())[1:]
    given = list(inspect.signature(getattr(module_of(name, modules), function)).parameters.values())
    assert [(p.name, p.kind, p.default) for p in given] == [(p.name, p.kind, p.default) for p in wanted]


def test_nine_functions():
    assert len(FUNCTIONS) == 7 and len(OF_SHARDS) == 2


@pytest.mark.parametrize("name", BACKENDS)
def test_mean(name):
    """No caller requests it for CPU tensors, whose labels the host counts; the contract holds all the same."""
    student, teachers = torch.randn(9, 20), [torch.randn(9, 20) for _ in range(3)]
    for scale in (1.0, 8.0, torch.tensor([8.0])):
        assert_means(module_of(name).row_loss, student, teachers, torch.randint(20, (9,)), scale)
    assert_agrees(module_of(name).row_loss, student, teachers, torch.randint(20, (9,)))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0, 1, 4], (3, None)),
        ([0, -7, 4], (2, None)),
        ([-7, -7], (0, None)),
        ([], (0, None)),
        ([1, -7, 5, 9, -7], (1, 2)),
    ],
)
def test_label_counters_agree(name, labels, expected):
    assert module_of(name).count_labels(torch.tensor(labels, dtype=torch.int64), 5, -7) == expected


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("second", "mix", "expected"),
    [
        ([4, 0, 2, 0], [0.0, 1.0, 0.5, 0.25], (3, None)),
        ([4, 99, 2, 0], [0.0, INF, 0.5, 0.25], (3, None)),  # of an ignored row
        ([4, 0, 5, 0], [0.0, 1.0, 0.5, 0.25], (1, 2)),
        ([4, 0, 2, -1], [0.0, 1.0, 1.0, 1.0], (2, 3)),
        ([-7, 0, 2, 0], [0.0, 1.0, 0.5, 0.25], (0, 0)),  # the ignored label as a second one
        ([4, 0, 2, 0], [-1e-6, 1.0, 0.5, 0.25], (0, 0)),
        ([4, 0, 2, 0], [0.0, 1.0, 0.5, 1 + 2**-23], (2, 3)),
        ([4, 0, 2, 0], [0.0, 1.0, float("nan"), 0.25], (1, 2)),
    ],
)
def test_label_counters_agree_on_second_labels(name, second, mix, expected):
    target = torch.tensor([0, -7, 4, 4])
    for dtype in (torch.float32, torch.float64):
        labels = contract.SecondLabels(torch.tensor(second), torch.tensor(mix, dtype=dtype))
        assert module_of(name).count_labels(target, 5, -7, labels) == expected


@pytest.mark.parametrize("name", BACKENDS)
def test_an_ignored_class_is_no_second_label(name):
    second = contract.SecondLabels(torch.tensor([2, 3, 0]), torch.full((3,), 0.5))
    assert module_of(name).count_labels(torch.tensor([1, 0, 4]), 5, 0, second) == (1, 2)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled module")
def test_constants_of_the_compiled_module(monkeypatch):
    from camkd_fast import _C
    from camkd_fast.backends import compiled

    assert (_C.MAX_TEACHERS, _C.TEMPERATURE_POWERS) == (contract.MAX_TEACHERS, contract.TEMPERATURE_POWERS)
    assert _C.WEIGHTINGS == WEIGHTINGS and Formula._fields == _C.FORMULA_FIELDS
    monkeypatch.setattr(contract, "MAX_TEACHERS", 17)
    with pytest.raises(ImportError, match="most teachers are 16, expected 17"):
        importlib.reload(compiled)
    monkeypatch.undo()
    importlib.reload(compiled)


def test_rows_are_named_in_order():
    logits, target = torch.randn(5, 7), torch.randint(7, (5,))
    result = reference.row_loss(logits, [logits * 2, logits + 1], target, Formula(), needs_grad=False)
    assert result.row_stats.shape[0] == contract.row_stats_count(2)
    hard = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    assert_near(result.row_stats[contract.HARD], hard)
    stacked = torch.cat(
        [result.row_stats[: contract.PER_TEACHER], result.divergence, result.teacher_ce, result.weights]
    )
    assert torch.equal(stacked, result.row_stats)


FORMULAS = [
    Formula(),
    Formula(divergence="reverse_kl", z_loss_weight=0.1),
    Formula(divergence=("jsd", 0.3), student_softcap=5.0),
    Formula(divergence=("skew", 0.3), student_logit_scale=0.5, weighting="min_ce"),
]


@pytest.mark.parametrize("name", [*BACKENDS, *(["triton"] if dispatch.interpreting() else [])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("N", "C"), [(9, 40), (3, 5000)])
@pytest.mark.parametrize("formula", FORMULAS, ids=lambda formula: str(formula.divergence))
def test_a_gradient_in_the_students_memory(formula, name, N, C, dtype):
    case = make_case(N, C, 2, dtype, padded=False, ignored=0.3)
    arguments = case.teachers, case.target, formula.checked(2)
    expected = module_of(name).row_loss(case.student, *arguments, needs_grad=True, grad_scale=0.5)
    student = case.student.clone()
    ours = module_of(name).row_loss(student, *arguments, needs_grad=True, grad_scale=0.5, out=student)
    assert ours.grad_student is student
    assert torch.equal(student, expected.grad_student) and torch.equal(ours.row_stats, expected.row_stats)
    nothing = module_of(name).row_loss(case.student, *arguments, needs_grad=False, out=student)
    assert nothing.grad_student is None and torch.equal(student, expected.grad_student)
