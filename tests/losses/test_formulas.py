"""The published formulas: weightings, temperatures, coefficients, ignored rows, reductions and dtypes."""

import pytest
import torch
import torch.nn.functional as F

from camkd_fast import CAMKDLoss, camkd_loss, camkd_loss_and_grad
from tests.support.cases import Case, make_case
from tests.support.evaluate import fields, run, run_value_and_grad
from tests.support.tolerance import assert_accurate, assert_near, assert_result, rms
from tests.support.truth import eager, naive, truth

WEIGHTINGS = ["confidence", "uniform", "entropy", "per teacher", "per row"]


def weighting_for(name: str, K: int, lead: tuple[int, ...]) -> str | torch.Tensor:
    generator = torch.Generator().manual_seed(K)
    shape = {"per teacher": (K,), "per row": (K, *lead)}.get(name)
    return name if shape is None else torch.rand(shape, generator=generator)


def check(case: Case, backend: str, grad_output: torch.Tensor | None = None) -> None:
    R, N = truth(case, grad_output), naive(case, grad_output)
    scale = 1.0 if grad_output is None else float(grad_output.abs().max())
    assert_result(run(case, backend, grad_output), case, R, N, "camkd_loss", scale)


@pytest.mark.parametrize("peaked", [False, True], ids=["noise", "peaked"])
@pytest.mark.parametrize("temperature", [1, 1.5, 2.0, 4.0, 20.0])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_every_weighting_and_temperature(weighting, temperature, peaked, backend):
    K = 3
    case = make_case(64, 100, K, peaked=peaked, temperature=temperature, weighting=weighting_for(weighting, K, (64,)))
    R, N = truth(case), naive(case)
    assert_result(run(case, backend), case, R, N)
    assert_result(run_value_and_grad(case, backend), case, R, N)


@pytest.mark.parametrize("hard_weight,soft_weight", [(0.0, 1.0), (1.0, 0.0), (0.3, 0.7), (2.0, 5.0), (-1.0, 0.5)])
def test_coefficients(hard_weight, soft_weight, backend):
    case = make_case(64, 100, hard_weight=hard_weight, soft_weight=soft_weight)
    check(case, backend)
    out = camkd_loss(case.student, case.teachers, case.target, backend=backend, **case.options())
    assert_near(out.loss, hard_weight * out.hard + soft_weight * out.soft)


@pytest.mark.parametrize("weighting", ["confidence", "uniform", "entropy"])
@pytest.mark.parametrize("K", [1, 2, 5])
@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
@pytest.mark.parametrize("C", [10, 1000, 32000])
def test_student_equal_to_every_teacher_has_no_loss_and_no_gradient(C, temperature, K, weighting, backend):
    logits = make_case(5, C, peaked=True).student.clone()
    case = Case(logits, (logits,) * K, torch.zeros(5, dtype=torch.int64), temperature, 0.0, weighting=weighting)
    result = run(case, backend)
    assert abs(float(result.loss)) <= 1e-6  # not relative: the exact loss is 0
    # Not exactly 0 in float32: the two probabilities that cancel are each rounded once.
    probabilities = (
        temperature * (logits / temperature).softmax(1) / 5 * (max(K - 1, 1) if weighting == "entropy" else 1)
    )
    assert rms(result.grad) <= 4 * torch.finfo(torch.float32).eps * rms(probabilities)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_confidence_weights_sum_to_one_and_discard_the_worst_teacher(dtype, backend):
    case = make_case(64, 100, 3, dtype, peaked=True)
    out = run(case, backend)
    assert_near(out.weights.sum(0), torch.ones(64))
    assert (out.weights >= 0).all() and (out.weights <= 0.5 + 1e-6).all()
    assert torch.equal(out.weights.argmin(0), out.teacher_ce.argmax(0))


def official_code_total(student, teachers, target, T, gamma, alpha):
    """The loss of the authors' repository, including its second division by K, which the paper does not have."""
    K = len(teachers)
    ce = torch.stack([F.cross_entropy(z, target, reduction="none") for z in teachers])
    weights = (1 - ce.softmax(0)) / (K - 1)
    kl = [F.kl_div((student / T).log_softmax(1), (z / T).softmax(1), reduction="none").sum(1) * T**2 for z in teachers]
    return gamma * F.cross_entropy(student, target) + alpha * (weights * torch.stack(kl)).sum(0).div(K).mean()


def test_parity_with_the_official_code_is_soft_weight_alpha_over_k(backend):
    case = make_case(64, 100, 3, soft_weight=1.0 / 3)
    theirs = official_code_total(case.student, case.teachers, case.target, 4.0, 1.0, 1.0)
    assert_near(run(case, backend).loss, theirs)


@pytest.mark.parametrize("C,noise", [(32000, 0.02), (1000, 0.05)])
def test_bfloat16_student_near_its_teachers(C, noise, backend):
    generator = torch.Generator().manual_seed(3)
    student = (3 * torch.randn(8, C, generator=generator)).bfloat16()
    teachers = tuple((student.float() + noise * torch.randn(8, C, generator=generator)).bfloat16() for _ in range(3))
    case = Case(student, teachers, torch.randint(C, (8,), generator=generator), hard_weight=0.0)
    R = truth(case).grad
    ours = run(case, backend).grad
    assert rms(ours.double() - R) <= 0.003 * rms(R)
    # The case is hard: the same formula in bfloat16 arithmetic is more than 2 % off.
    assert rms(eager(case, torch.bfloat16).grad.double() - R) > 0.02 * rms(R)


@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("weighting", ["confidence", "per row"])
def test_ignored_rows(weighting, reduction, ignored, backend):
    case = make_case(40, 33, ignored=ignored, reduction=reduction, weighting=weighting_for(weighting, 3, (40,)))
    grad_output = torch.randn(40) if reduction == "none" else torch.randn(())
    check(case, backend, grad_output)


@pytest.mark.parametrize("ignored", [0.3, 1.0])
def test_ignored_rows_are_exactly_zero_even_if_nan(ignored, backend):
    for reduction in ("none", "sum", "mean"):
        case = make_case(40, 33, ignored=ignored, reduction=reduction)
        excluded = case.target == -100
        spoiled = [z.masked_fill(excluded.unsqueeze(1), float("nan")) for z in (case.student, *case.teachers)]
        grad_output = torch.randn(40) if reduction == "none" else None
        result = run(case.with_(student=spoiled[0], teachers=tuple(spoiled[1:])), backend, grad_output)
        clean = run(case, backend, grad_output)
        for ours, expected in zip(result[:-1], clean[:-1], strict=True):
            assert torch.equal(ours, expected)
        for per_row in (result.weights, result.teacher_ce, result.divergence):
            assert (per_row[:, excluded] == 0).all()
        assert (result.grad[excluded] == 0).all()
        if ignored == 1.0:
            assert (result.loss == 0).all() and (result.grad == 0).all()


@pytest.mark.parametrize("given", [False, True], ids=["confidence", "given weights"])
@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
def test_ignored_rows_are_zero_whatever_comes_in(factor, given, backend):
    """As with nn.CrossEntropyLoss: a mean of each sample that has no label, say, is 0 / 0."""
    case = make_case(6, 33, reduction="none")
    student, weights = case.student.clone().requires_grad_(), torch.rand(3, 6).requires_grad_(given)
    target = case.target.index_fill(0, torch.tensor([1, 4]), -100)
    options = {**case.options(), **({"weighting": weights} if given else {})}
    grad_output = torch.ones(6).index_fill(0, torch.tensor([1, 4]), factor)

    def loss(x):
        return camkd_loss(x, case.teachers, target, backend=backend, **options).loss

    for function in (loss, torch.compile(loss, backend="aot_eager")):
        student.grad = weights.grad = None
        function(student).backward(grad_output)
        assert student.grad.isfinite().all() and not student.grad[[1, 4]].any() and student.grad[0].any()
        if given:
            assert weights.grad.isfinite().all() and not weights.grad[:, [1, 4]].any()


# The CPU kernels share a row among threads if there are fewer rows than threads, or if its scratch exceeds 4 MB.
@pytest.mark.parametrize(("N", "C", "K"), [(1, 50000, 3), (3, 250000, 3), (3, 70000, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ignored_rows_are_exactly_zero_where_threads_share_a_row(dtype, N, C, K, backend):
    assert torch.get_num_threads() == 2
    case = make_case(N, C, K, dtype)
    case.target[::2] = -100
    R, N_ = truth(case).grad, naive(case).grad
    for result in (run(case, backend), run_value_and_grad(case, backend)):
        for per_row in (result.weights, result.teacher_ce, result.divergence):
            assert (per_row[:, ::2] == 0).all()
        assert (result.grad[::2] == 0).all()
        assert_accurate(result.grad, R, N_)


@pytest.mark.parametrize(("N", "C"), [(9, 130_001), (2100, 515), (70, 16_387)])
def test_gradients_that_do_not_stay_in_the_cache(N, C):
    """Above 4 MB the CPU kernels store around the cache; of odd widths, so that rows begin at any address."""
    case = make_case(N, C, 1, padded=False)
    assert N * C * 4 > 4 * 2**20 and C % 2 == 1
    assert_accurate(run_value_and_grad(case, "auto").grad, truth(case).grad, naive(case).grad)


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_that_share_a_row_do_not_disturb_each_other(threads):
    """Long enough for a thread to be interrupted in the middle of a block, if the machine has fewer processors."""
    case = make_case(1, 500_000, 3, padded=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run_value_and_grad(case, "auto")
        torch.set_num_threads(threads)
        for _ in range(12):
            result = run_value_and_grad(case, "auto")
            assert_near(result.divergence, expected.divergence)
            assert_near(result.grad, expected.grad)
    finally:
        torch.set_num_threads(before)


def test_ignore_index_may_be_a_class(backend):
    case = make_case(40, 10, ignore_index=7)
    assert (case.target == 7).any()
    check(case, backend)


def test_random_grad_output_for_every_reduction(backend):
    for reduction, grad_output in (("none", torch.randn(64)), ("sum", torch.tensor(-3.7)), ("mean", torch.tensor(0.2))):
        check(make_case(64, 33, reduction=reduction, ignored=0.2), backend, grad_output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("loss_scale", [1.0, 1024.0, torch.tensor(0.25), torch.tensor([8.0])], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_loss_scale_multiplies_only_the_gradient(reduction, loss_scale, dtype, backend):
    case = make_case(64, 33, dtype=dtype, reduction=reduction, ignored=0.2)
    factor = torch.full((64,) if reduction == "none" else (), float(loss_scale))
    R, N = truth(case, factor), naive(case, factor)
    assert_result(run_value_and_grad(case, backend, loss_scale), case, R, N, "", float(loss_scale))


@pytest.mark.parametrize("num_items", [7, 12.5, torch.tensor(9), torch.tensor([9.5])], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_num_items_is_the_divisor(dtype, num_items, backend):
    if dtype == torch.float64:
        backend = "reference"
    case = make_case(64, 33, dtype=dtype, num_items=num_items, ignored=0.2)
    R, N = truth(case), naive(case)
    assert_result(run(case, backend), case, R, N)
    assert_result(run_value_and_grad(case, backend), case, R, N)
    summed = run(case.with_(num_items=None, reduction="sum"), backend).loss
    assert_near(run(case, backend).loss, summed / float(num_items))


@pytest.mark.parametrize("student", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_mixed_dtypes(student, backend):
    for peaked in (False, True):
        teachers = (torch.float16, torch.float32, torch.bfloat16)
        case = make_case(64, 129, 4, student, peaked=peaked, teacher_dtypes=teachers)
        R, N = truth(case), naive(case)
        assert_result(run(case, backend), case, R, N)
        assert_result(run_value_and_grad(case, backend), case, R, N)


@pytest.mark.parametrize("seed", range(3))
def test_same_bits_every_run(seed, backend):
    case = make_case(64, 1128, peaked=bool(seed % 2), seed=seed)
    first = run(case, backend)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(case, backend)[:-1], first[:-1], strict=True))


def test_no_rows(backend):
    for reduction in ("mean", "sum", "none"):
        case = make_case(0, 10, reduction=reduction)
        grad_output = torch.ones(0) if reduction == "none" else None
        for result in (run(case, backend, grad_output), run_value_and_grad(case, backend)):
            assert result.grad.shape == (0, 10) and result.weights.shape == (3, 0)
            assert result.loss.shape == ((0,) if reduction == "none" else ()) and result.loss.sum() == 0


def test_module_equals_the_function(backend):
    case = make_case(16, 10, temperature=2.0, hard_weight=0.3, soft_weight=0.6, weighting="entropy", ignored=0.3)
    module = CAMKDLoss(2.0, 0.3, 0.6, "entropy", backend=backend)
    for num_items in (None, 5):
        expected = run(case.with_(num_items=num_items), backend)
        out = module(case.student, case.teachers, case.target, num_items=num_items)
        assert all(torch.equal(a, b) for a, b in zip(fields(out), expected, strict=False))
    assert "temperature=2.0" in repr(module) and "entropy" in repr(module)


def test_learned_weights_are_a_parameter_of_the_module(backend):
    module = CAMKDLoss(weighting=torch.nn.Parameter(torch.full((3,), 1 / 3)), backend=backend)
    assert [name for name, _ in module.named_parameters()] == ["weighting"]
    case = make_case(16, 10)
    module(case.student, case.teachers, case.target).loss.backward()
    assert (module.weighting.grad > 0).all()


def test_only_the_loss_is_differentiable(backend):
    case = make_case(16, 10, weighting=torch.rand(3, 16).requires_grad_())
    out = camkd_loss(case.student.requires_grad_(), case.teachers, case.target, weighting=case.weighting)
    for weighting in ("confidence", case.weighting):
        out = camkd_loss(case.student, case.teachers, case.target, weighting=weighting, backend=backend)
        assert [x.requires_grad for x in fields(out)] == [True, False, False, False, False, False]
        out, grad = camkd_loss_and_grad(case.student, case.teachers, case.target, weighting=weighting, backend=backend)
        assert not any(x.requires_grad for x in (*fields(out), grad))
