"""Autograd: inputs unchanged; shared, retained, accumulated, recomputed and refused graphs."""

import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from camkd_fast import camkd_loss, camkd_loss_and_grad
from camkd_fast.losses.formula import Formula
from tests.support.cases import Case, make_case
from tests.support.evaluate import fields, run
from tests.support.tolerance import assert_accurate, assert_near, assert_result, roundoff
from tests.support.truth import eager, naive, truth


def loss_of(case: Case, student: torch.Tensor, backend: str) -> torch.Tensor:
    return camkd_loss(student, case.teachers, case.target, backend=backend, **case.options()).loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_inputs_are_bitwise_unchanged(reduction, dtype, backend):
    case = make_case(33, 129, dtype=dtype, ignored=0.2, reduction=reduction, weighting=torch.rand(3, 33))
    inputs = [case.student, *case.teachers, case.target, case.weighting]
    # Compare whole buffers: a store into the padding between rows must show as well.
    buffers = [x if x._base is None else x._base for x in inputs]
    before = [x.clone() for x in buffers]
    student = case.student.detach().requires_grad_()
    grad_output = torch.randn(33) if reduction == "none" else torch.tensor(2.0)
    kept = grad_output.clone()
    loss_of(case, student, backend).backward(grad_output)
    camkd_loss_and_grad(case.student, case.teachers, case.target, backend=backend, **case.options())
    assert torch.equal(grad_output, kept)
    for x, old in zip(buffers, before, strict=True):
        assert torch.equal(x.nan_to_num(nan=7.0), old.nan_to_num(nan=7.0))


def test_output_never_aliases_an_input(backend):
    case = make_case(4, 10, padded=False, weighting=torch.rand(3, 4))
    out, grad = camkd_loss_and_grad(case.student, case.teachers, case.target, backend=backend, **case.options())
    inputs = {x.untyped_storage().data_ptr() for x in (case.student, *case.teachers, case.weighting)}
    assert inputs.isdisjoint(x.untyped_storage().data_ptr() for x in (*fields(out), grad))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_retained_graph_gives_the_same_gradient_each_time(reduction, backend):
    case = make_case(33, 129, reduction=reduction)
    # A factor of 1 needs no multiplication, but the gradient must not be the saved tensor itself.
    for dtype, factor in ((torch.float32, 3.0), (torch.float16, 3.0), (torch.float32, 1.0)):
        student = case.student.detach().to(dtype).requires_grad_()
        loss = loss_of(case, student, backend)
        first = torch.autograd.grad(loss, student, torch.tensor(factor), retain_graph=True)[0]
        copy = first.clone()
        second = torch.autograd.grad(loss, student, torch.tensor(factor), retain_graph=True)[0]
        assert torch.equal(first, copy), "a later backward wrote into an earlier gradient"
        assert torch.equal(second, first)
        last = torch.autograd.grad(loss, student, torch.tensor(2 * factor))[0]
        assert_near(last, 2 * copy)
        assert torch.equal(first, copy) and torch.equal(second, copy)
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


def test_two_heads_on_one_tensor(backend):
    case = make_case(33, 129)
    other = case.with_(temperature=1.0, weighting="uniform", hard_weight=0.5)
    student = case.student.detach().requires_grad_()
    total = loss_of(case, student, backend) + 2 * loss_of(other, student, backend) + student.square().sum()
    total.backward()
    R = truth(case).grad + 2 * truth(other).grad + 2 * case.student.double()
    N = naive(case).grad + 2 * naive(other).grad + 2 * case.student
    assert_accurate(student.grad, R, N)


def test_one_loss_used_twice(backend):
    case = make_case(33, 129)
    student = case.student.detach().requires_grad_()
    loss = loss_of(case, student, backend)
    (loss * loss + loss).backward()
    factor = 2 * truth(case).loss + 1
    assert_accurate(student.grad, truth(case, factor).grad, naive(case, factor.float()).grad)


def test_gradients_accumulate(backend):
    cases = [make_case(16, 33, seed=seed) for seed in range(3)]
    body = torch.randn(33, 33, requires_grad=True)
    for case in cases:
        loss_of(case, case.student @ body, backend).backward()
    R = sum(case.student.double().T @ truth(case.with_(student=case.student @ body.detach())).grad for case in cases)
    N = sum(case.student.T @ naive(case.with_(student=case.student @ body.detach())).grad for case in cases)
    assert_accurate(body.grad, R, N)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant, backend):
    case = make_case(33, 129)
    student = case.student.detach().requires_grad_()
    checkpoint(functools.partial(loss_of, case, backend=backend), student, use_reentrant=use_reentrant).backward()
    assert torch.equal(student.grad, run(case, backend).grad)


def test_saved_tensor_hooks(backend):
    case = make_case(33, 129)
    student = case.student.detach().requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        loss = loss_of(case, student, backend)
    loss.backward()
    assert torch.equal(student.grad, run(case, backend).grad)


def test_gradient_reaches_a_model_through_a_view(backend):
    case = make_case(12, 33, lead=(3, 4))
    body = nn.Linear(33, 33)
    teachers, target = [z[:, :-1] for z in case.teachers], case.target[:, :-1]
    camkd_loss(body(case.student)[:, :-1], teachers, target, backend=backend).loss.backward()
    twin = nn.Linear(33, 33)
    twin.load_state_dict(body.state_dict())
    shorter = Case(twin(case.student)[:, :-1], tuple(teachers), target)
    shorter.student.backward(truth(shorter).grad.float())
    assert_near(body.weight.grad, twin.weight.grad)


def test_double_backward_is_refused(backend):
    for weighting in ("confidence", torch.rand(3).requires_grad_()):
        student = torch.randn(4, 10, requires_grad=True)
        teachers = [torch.randn(4, 10) for _ in range(3)]
        out = camkd_loss(student, teachers, torch.zeros(4, dtype=torch.int64), weighting=weighting, backend=backend)
        with pytest.raises(RuntimeError, match=r"camkd_fast: double backward .* got create_graph=True"):
            torch.autograd.grad(out.loss, student, create_graph=True)
        with pytest.raises(RuntimeError, match="camkd_fast: double backward"):
            out.loss.backward(create_graph=True)
        assert student.grad is None


@pytest.mark.parametrize("shape", ["per teacher", "per row"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_learned_weights(reduction, shape, backend):
    for K in (1, 2, 5):
        weighting = torch.rand(K) if shape == "per teacher" else torch.rand(K, 33)
        case = make_case(33, 129, K, weighting=weighting, reduction=reduction, ignored=0.3, temperature=2.0)
        grad_output = torch.randn(33) if reduction == "none" else torch.tensor(0.7)
        R, N = truth(case, grad_output), naive(case, grad_output)
        assert_result(run(case, backend, grad_output), case, R, N, scale=100.0)


def test_learned_weights_of_a_student_without_grad(backend):
    case = make_case(33, 129, weighting=torch.rand(3).requires_grad_())
    loss_of(case, case.student, backend).backward()
    detached = case.with_(weighting=case.weighting.detach())
    floor = roundoff(detached, "grad_weighting")
    assert_accurate(case.weighting.grad, truth(detached).grad_weighting, naive(detached).grad_weighting, "grad", floor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_learned_weights_of_another_dtype(dtype, backend):
    weights = torch.rand(3).to(dtype).requires_grad_()
    case = make_case(33, 129, weighting=weights.detach().float())
    loss_of(case.with_(weighting=weights), case.student, backend).backward()
    assert weights.grad.dtype == dtype
    assert_near(weights.grad, truth(case).grad_weighting.to(dtype), rtol=max(1e-5, torch.finfo(dtype).eps))


def test_the_gradient_of_half_precision_weights_is_summed_before_it_is_rounded(backend):
    """Of many rows, each of which is too small for float16."""
    N = 40_000
    student, teachers, target = torch.randn(N, 2), list(torch.randn(2, N, 2)), torch.randint(2, (N,))
    found = []
    for dtype in (torch.float16, torch.float32):
        weights = torch.tensor([0.5, 0.25], dtype=dtype, requires_grad=True)
        camkd_loss(student, teachers, target, weighting=weights, soft_weight=1e-3, backend=backend).loss.backward()
        found.append(weights.grad.float())
    assert_near(found[0], found[1], rtol=2e-3)


def test_no_graph_unless_an_input_requires_grad(backend):
    case = make_case(4, 10)
    with torch.no_grad():
        assert not loss_of(case, case.student.detach().requires_grad_(), backend).requires_grad
    assert not loss_of(case, case.student, backend).requires_grad
    with torch.inference_mode():
        assert float(loss_of(case, case.student, backend)) > 0


def test_autocast_changes_nothing(backend):
    case = make_case(33, 129, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(case, backend)
    assert_result(inside, case, truth(case), naive(case))


def test_loss_and_grad_trains_a_model_like_the_loss(backend):
    case = make_case(16, 33)
    body, twin = (torch.full((33, 33), 0.1, requires_grad=True) for _ in range(2))
    loss_of(case, case.student @ body, backend).backward()
    logits = case.student @ twin
    _, grad = camkd_loss_and_grad(logits, case.teachers, case.target, backend=backend, **case.options())
    logits.backward(grad)
    assert torch.equal(body.grad, twin.grad)


# --- derivative checks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["confidence", "uniform", "entropy", "per teacher", "per row"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_gradcheck_in_float64(reduction, weighting):
    case = make_case(5, 7, 3, torch.float64, peaked=True, ignored=0.3, reduction=reduction, temperature=2.0)
    student = (case.student / 5).detach().requires_grad_()
    if weighting.startswith("per"):
        weighting = torch.rand(3, *(() if weighting == "per teacher" else (5,)), dtype=torch.float64).requires_grad_()

    def function(student, weighting):
        options = case.options() | {"weighting": weighting}
        return camkd_loss(student, case.teachers, case.target, backend="reference", **options).loss

    # Only tensors that require grad: gradcheck perturbs its inputs, and a label cannot be perturbed.
    assert torch.autograd.gradcheck(function, (student, weighting))


@pytest.mark.parametrize("weighting", ["confidence", "entropy", "uniform"])
def test_finite_differences_of_the_float32_loss(weighting, backend):
    # Central differences of the backend's own loss along random directions, independent of any gradient formula. At a
    # step of 0.01 truncation is about 1e-5 of the slope, and float32 roundoff of the loss about 1e-4.
    case = make_case(8, 50, peaked=True, weighting=weighting, reduction="sum", hard_weight=0.5)
    case = case.with_(student=case.student / 8, temperature=2.0)
    grad = run(case, backend).grad.double()
    generator = torch.Generator().manual_seed(11)
    step = 0.01
    for direction in (grad.sign(), torch.randn(8, 50, generator=generator).sign() * (grad.abs() > grad.abs().mean())):
        shifted = [case.student + sign * step * direction.float() for sign in (1, -1)]
        above, below = (run(case.with_(student=s), backend).loss.double() for s in shifted)
        slope = (above - below) / (2 * step)
        expected = (grad * direction).sum()
        assert abs(slope - expected) <= 2e-3 * grad.abs().sum()


def test_float64_runs_on_the_reference():
    case = make_case(8, 50, dtype=torch.float64)
    R = eager(case, torch.float64)
    assert_near(run(case, "auto").grad, R.grad, rtol=1e-10)


def test_undefined_gradients_of_the_operator() -> None:
    """As gradcheck makes them: no gradient at all, in place of zeros."""
    student = torch.randn(4, 5, requires_grad=True)
    row_stats, _ = torch.ops.camkd_fast.row_loss(
        student, [torch.randn(4, 5)], torch.arange(4), *(None,) * 4, *Formula(weighting="uniform").constants(), True,
        "reference",
    )  # fmt: skip
    undefined = torch._C._functions.UndefinedGrad()(row_stats)
    assert torch.autograd.grad(undefined.sum(), [student], allow_unused=True) == (None,)
