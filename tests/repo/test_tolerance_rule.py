"""The test support itself: the tolerance rule and the contracts reject wrong results, cases are as described."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from camkd_fast.backends import dispatch, reference
from camkd_fast.backends.contract import RowLossResult
from tests.support.backends import BACKENDS
from tests.support.cases import make_case
from tests.support.evaluate import run
from tests.support.op_contract import (
    assert_confidence,
    assert_confidence_edges,
    assert_feature_loss,
    assert_feature_module,
    assert_features,
    assert_scales_rows,
)
from tests.support.row_contract import assert_agrees, assert_means
from tests.support.tolerance import assert_accurate, assert_near, truncated
from tests.support.truth import naive, truth

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("peaked", [False, True], ids=["noise", "peaked"])
@pytest.mark.parametrize(("N", "C"), [(64, 100), (7, 32000)])
def test_rule_rejects_a_zero_and_a_slightly_wrong_gradient(N, C, peaked, dtype):
    case = make_case(N, C, dtype=dtype, peaked=peaked)
    R, N_ = truth(case).grad, naive(case).grad
    assert_accurate(R.to(dtype), R, N_)
    assert_near(R.to(dtype), R)
    for wrong in (torch.zeros_like(R), 1.01 * R, 0.99 * R, R.roll(1, 0), -R):
        with pytest.raises(AssertionError, match="RMS error"):
            assert_accurate(wrong.to(dtype), R, N_)
    with pytest.raises(AssertionError, match="RMS difference"):
        assert_near(torch.zeros_like(R).to(dtype), R)


def test_rule_requires_the_same_infinities_and_nan():
    inf, nan = float("inf"), float("nan")
    R = torch.tensor([1.0, inf, nan], dtype=torch.float64)
    for check in (lambda x: assert_accurate(x, R, R), lambda x: assert_near(x, R)):
        check(R.float())
        for wrong in ([1.0, 1e30, nan], [1.0, -inf, nan], [1.0, nan, nan], [nan, inf, nan], [1.0, inf, 0.0]):
            with pytest.raises(AssertionError):
                check(torch.tensor(wrong))


def test_rule_rejects_an_n_that_is_not_finite():
    R = torch.ones(2, dtype=torch.float64)
    with pytest.raises(AssertionError, match="N is"):
        assert_accurate(torch.zeros(2), R, torch.tensor([1.0, float("inf")]))


def test_truncated_is_bfloat16_rounded_towards_zero():
    values = torch.tensor([1.0, 1.0 + 2**-7 + 2**-8, -1.0 - 2**-7 - 2**-8, 1.0 - 2**-20])
    assert truncated(values, torch.bfloat16).tolist() == [1.0, 1.0 + 2**-7, -1.0 - 2**-7, 1.0 - 2**-8]
    assert truncated(values, torch.float16) is values


# --- the contracts of the backends ------------------------------------------------------------------------------------

FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": torch.zeros_like,
    "1 % too large": lambda g: (g.double() * 1.01).to(g.dtype),
    "1 % too small": lambda g: (g.double() * 0.99).to(g.dtype),
}


def faulty(function: Callable[..., Any], fault: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """`function` with a fault in each of its results."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        return fault(result) if isinstance(result, Tensor) else type(result)(map(fault, result))

    return wrong


def faulty_gradients(function: Callable[..., Any], fault: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """A feature_loss with a fault in its gradients."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        for grad in result.grads:
            grad.copy_(fault(grad))
        return result

    return wrong


def backend_with(**functions: Any) -> SimpleNamespace:
    """The reference, some of its functions replaced."""
    names = ("row_loss", "scale_rows", "confidence_forward", "confidence_backward")
    names += ("feature_loss", "feature_forward", "feature_backward")
    return SimpleNamespace(**{name: getattr(reference, name) for name in names} | functions)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", [70, 1000])
def test_row_contract_rejects_a_wrong_gradient(C, dtype, fault):
    student, *teachers = (3 * torch.randn(4, 4, C)).to(dtype).unbind()
    target = torch.tensor([3, C - 1, 0, 40])

    def wrong(*args: Any, **kwargs: Any) -> RowLossResult:
        result = reference.row_loss(*args, **kwargs)
        return replace(result, grad_student=fault(result.grad_student))

    for contract in (assert_agrees, functools.partial(assert_means, scale=8.0)):
        contract(reference.row_loss, student, teachers, target)
        with pytest.raises(AssertionError, match="grad: RMS error"):
            contract(wrong, student, teachers, target)


@pytest.mark.parametrize("row", range(12))
def test_row_contract_rejects_each_wrong_statistic(row):
    student, *teachers = (3 * torch.randn(4, 4, 70)).unbind()
    target = torch.tensor([3, 69, -100, 40])

    def wrong(*args: Any, **kwargs: Any) -> RowLossResult:
        result = reference.row_loss(*args, **kwargs)
        result.row_stats[row] *= 1.01
        return result

    with pytest.raises(AssertionError, match="RMS error"):
        assert_agrees(wrong, student, teachers, target)


def test_row_contract_rejects_garbage_in_ignored_rows():
    student, *teachers = torch.randn(4, 4, 70).unbind()
    target = torch.tensor([3, -100, 0, 40])

    def wrong(*args: Any, **kwargs: Any) -> RowLossResult:
        result = reference.row_loss(*args, **kwargs)
        result.grad_student[1, 5] = 1e-12
        return result

    with pytest.raises(AssertionError):
        assert_agrees(wrong, student, teachers, target)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("name", ["confidence_forward", "confidence_backward"])
@pytest.mark.parametrize(("C", "dtype"), [(10, torch.float32), (101, torch.bfloat16), (3000, torch.float16)], ids=str)
def test_confidence_contract_rejects_wrong_results(C, dtype, name, fault):
    logits, target = [(3 * torch.randn(4, C)).to(dtype) for _ in range(3)], torch.randint(C, (4,))
    assert_confidence(backend_with(), logits, target)
    with pytest.raises(AssertionError, match="RMS error"):
        assert_confidence(backend_with(**{name: faulty(getattr(reference, name), fault)}), logits, target)


def test_confidence_edges_reject_wrong_weights():
    assert_confidence_edges(backend_with())
    for fault in FAULTS.values():
        with pytest.raises(AssertionError):
            assert_confidence_edges(backend_with(confidence_forward=faulty(reference.confidence_forward, fault)))


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("name", ["feature_forward", "feature_backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_feature_contract_rejects_wrong_results(dtype, name, fault):
    student, teachers = ([torch.randn(3, width).to(dtype) for width in (100, 1300, 33)] for _ in range(2))
    assert_features(backend_with(), student, teachers)
    with pytest.raises(AssertionError, match="RMS error"):
        assert_features(backend_with(**{name: faulty(getattr(reference, name), fault)}), student, teachers)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("field", ["loss", "error", "grads"])
def test_feature_loss_contract_rejects_wrong_results(field, fault):
    student, teachers = ([torch.randn(3, width).bfloat16() for width in (100, 1300, 33)] for _ in range(2))
    assert_feature_loss(backend_with(), student, teachers)
    wrong = faulty_gradients(reference.feature_loss, fault)
    if field != "grads":

        def wrong(*args, **kwargs):
            result = reference.feature_loss(*args, **kwargs)
            return result._replace(**{field: fault(getattr(result, field))})

    with pytest.raises(AssertionError, match="RMS error"):
        assert_feature_loss(backend_with(feature_loss=wrong), student, teachers)


def test_feature_contract_of_a_truncating_backend_rejects_a_wrong_gradient():
    bf16 = torch.bfloat16
    student, teachers = ([torch.randn(3, width).to(bf16) for width in (100, 1300, 33)] for _ in range(2))

    def backward(factor: float) -> Callable[..., list[Tensor]]:
        def truncating(student: list[Tensor], teachers: list[Tensor], grad: Tensor) -> list[Tensor]:
            exact = reference.feature_backward([r.float() for r in student], teachers, factor * grad)
            return [truncated(x, bf16).to(bf16) for x in exact]

        return truncating

    assert_features(backend_with(feature_backward=backward(1.0)), student, teachers, truncated)
    for factor in (0.0, 0.99, 1.01):
        with pytest.raises(AssertionError, match="RMS error"):
            assert_features(backend_with(feature_backward=backward(factor)), student, teachers, truncated)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="a build without the compiled module")
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("name", ["feature_loss", "confidence_backward", "confidence_gradients"])
def test_feature_module_contract_rejects_a_wrong_gradient(name, fault, monkeypatch):
    assert_feature_module("cpu")
    cpu = dispatch.backend_for("cpu", [torch.zeros(1)])
    owner = cpu.whole_losses if name == "confidence_gradients" else cpu
    wrong = faulty_gradients(cpu.feature_loss, fault) if name == "feature_loss" else faulty(getattr(owner, name), fault)
    monkeypatch.setattr(owner, name, wrong)
    if name in ("feature_loss", "confidence_backward"):
        monkeypatch.setattr(cpu.whole_losses, "connected", False)  # the calls of C++ do not use them
    with pytest.raises(AssertionError, match="RMS difference"):
        assert_feature_module("cpu")


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaling_contract_rejects_a_wrong_product(dtype, fault):
    assert_scales_rows(backend_with(), 10, dtype)

    def wrong(gradient: Tensor, factor: Tensor, out: Tensor) -> Tensor:
        return out.copy_(fault(reference.scale_rows(gradient, factor, torch.empty_like(gradient))))

    with pytest.raises(AssertionError):
        assert_scales_rows(backend_with(scale_rows=wrong), 10, dtype)


# --- no absolute tolerances -------------------------------------------------------------------------------------------

# File: how many absolute tolerances it may have, and why. Prefer tests/support/tolerance.py, torch.equal, or rtol with
# atol=0.
ABSOLUTE = {
    "test_augment.py": (1, "deciles of a uniform distribution; relative to its width"),
    "test_demo.py": (2, "teacher weights, which sum to 1, from logs rounded to 4 digits"),
    "test_loaders.py": (1, "normalised pixels of order 1, which do not depend on any size"),
    "test_min_norm.py": (2, "weights that sum to 1, some of them exactly 0"),
    "test_strategies.py": (5, "weights that sum to at most K - 1, some of them 0, and mean losses of order 1"),
    "test_study.py": (2, "teacher weights, which sum to 1, from logs rounded to 4 digits"),
    "test_truncation.py": (2, "float64 probabilities, which may underflow to 0; with rtol"),
    "test_zoo.py": (1, "logits of order 1 next to 0; with rtol"),
}


def test_absolute_tolerances_have_a_written_reason():
    found = {}
    for path in sorted(TESTS.rglob("*.py")):
        count = len(re.findall(r"\batol=(?!0[,)])", path.read_text()))
        if path != Path(__file__) and count > ABSOLUTE.get(path.name, (0, ""))[0]:
            found[str(path.relative_to(TESTS))] = count
    assert not found, f"absolute tolerances without a reason in ABSOLUTE: {found}"


@pytest.mark.parametrize("folder", ["backends", "cuda", "gpu", "losses"])
def test_losses_and_backends_do_not_use_the_default_tolerance_of_torch(folder):
    """assert_close without arguments has atol=1e-5, which a zero gradient may pass."""
    assert [path.name for path in (TESTS / folder).rglob("*.py") if "assert_close(" in path.read_text()] == []


# --- memory and cases -------------------------------------------------------------------------------------------------


def test_uninitialised_memory_is_poisoned():
    like = torch.ones(5)
    for fresh in (torch.empty(5), torch.empty_like(like), like.new_empty(5), torch.empty_strided((2, 2), (1, 2))):
        assert fresh.isnan().all()
    assert torch.empty(5, dtype=torch.bfloat16).isnan().all()


def test_peaked_cases_are_peaked_and_layouts_are_not_trivial():
    noise, peaked = make_case(64, 100), make_case(64, 100, peaked=True)
    confidence = [torch.stack(c.teachers).softmax(-1).amax(-1).median() for c in (noise, peaked)]
    assert confidence[0] < 0.2 and confidence[1] > 0.9
    right = (torch.stack(peaked.teachers).argmax(-1) == peaked.target).float().mean(1)
    assert right[0] > right[1] > right[2] > 0.1
    assert not any(z.is_contiguous() for z in (peaked.student, *peaked.teachers))
    assert len({z.stride() for z in (peaked.student, *peaked.teachers)}) > 2


def test_a_run_reads_only_the_view():
    case = make_case(4, 10)
    assert case.student._base is not None and case.student._base.isnan().any()
    assert run(case, "reference").grad.isfinite().all()
