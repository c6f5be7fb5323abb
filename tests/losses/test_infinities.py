"""Masked and infinite values: -inf columns and tiles, infinite losses and teacher cross-entropies."""

import pytest
import torch

from camkd_fast import camkd_loss, confidence_weights
from tests.support.cases import Case, make_case, nearly_no_weight
from tests.support.evaluate import Result, run, run_value_and_grad
from tests.support.tolerance import assert_accurate, assert_near, assert_result
from tests.support.truth import naive, truth

INF = float("inf")


def masked(case: Case, columns: torch.Tensor) -> Case:
    """-inf in `columns` of student and teachers, labels moved out of them."""
    allowed = torch.arange(case.student.shape[-1])[~columns]
    tensors = [z.masked_fill(columns, -INF) for z in (case.student, *case.teachers)]
    return case.with_(student=tensors[0], teachers=tuple(tensors[1:]), target=allowed[case.target % len(allowed)])


# 40000 columns are for whole masked tiles, whose handling does not depend on dtype and weighting.
@pytest.mark.parametrize(
    ("C", "dtype", "weighting"),
    [
        *((C, torch.float32, w) for C in (10, 1000) for w in ("confidence", "entropy", "uniform")),
        *((C, dtype, "confidence") for C in (10, 1000) for dtype in (torch.bfloat16, torch.float16)),
        (40000, torch.float32, "entropy"),
    ],
)
def test_columns_masked_everywhere_contribute_nothing(C, dtype, weighting, backend):
    case = make_case(3, C, dtype=dtype, weighting=weighting, peaked=True)
    # Single columns, a whole tile in the middle, the first tile, the last, all but two columns.
    masks = [torch.arange(C) % 3 == 0, torch.zeros(C, dtype=torch.bool)]
    masks[1][C // 4 : 3 * C // 4] = True
    masks.append(torch.arange(C) < C // 2)
    masks.append(torch.arange(C) >= C // 2)
    masks.append((torch.arange(C) != C - 1) & (torch.arange(C) != C // 3))
    for columns in masks:
        partly = masked(case, columns)
        R, N = truth(partly), naive(partly)
        for result in (run(partly, backend), run_value_and_grad(partly, backend)):
            assert (result.grad[:, columns] == 0).all()
            assert_result(result, partly, R, N)


@pytest.mark.parametrize("temperature", [1.0, 2.5, 4.0])
@pytest.mark.parametrize("lowest", [(1, 2, 3), (0,), (2,)], ids=["teachers", "student", "one teacher"])
@pytest.mark.parametrize(("C", "weighting"), [(70, "confidence"), (40000, "confidence"), (40000, "entropy")])
def test_blocks_masked_with_infinity_and_with_the_lowest_number(C, weighting, lowest, temperature, backend):
    # The first columns are masked: there the running maximum is the mask itself, whose sums must vanish later.
    case = make_case(3, C, temperature=temperature, padded=False, hard_weight=0.5, weighting=weighting)
    for i, z in enumerate((case.student, *case.teachers)):
        z[:, : C // 2] = torch.finfo(torch.float32).min if i in lowest else -INF
    case = case.with_(target=case.target % (C // 2) + C // 2)
    R, N = truth(case), naive(case)
    for result in (run(case, backend), run_value_and_grad(case, backend)):
        assert (result.grad[:, : C // 2] == 0).all()
        assert_result(result, case, R, N)


def test_columns_masked_in_one_teacher(backend):
    # p = 0 contributes nothing to that teacher's KL, and the gradient there is that of q only.
    case = make_case(9, 33)
    teachers = list(case.teachers)
    teachers[1] = teachers[1].masked_fill(
        (torch.arange(33) % 4 == 0) & (case.target.unsqueeze(1) != torch.arange(33)), -INF
    )
    partly = case.with_(teachers=tuple(teachers))
    assert_result(run(partly, backend), partly, truth(partly), naive(partly))


@pytest.mark.parametrize("weighting", ["confidence", "uniform", "per row"])
def test_student_that_masks_a_class_of_a_teacher_has_infinite_loss_in_that_row(weighting, backend):
    weights = torch.rand(3, 9) + 0.1 if weighting == "per row" else weighting
    case = make_case(9, 33, reduction="none", weighting=weights)
    clean = run(case, backend, torch.ones(9))
    student = case.student.clone()
    label, column = int(case.target[4]), (int(case.target[4]) + 1) % 33
    student[4, column] = -INF
    result = run(case.with_(student=student), backend, torch.ones(9))
    assert label != column
    assert result.loss[4] == INF and result.soft[4] == INF and (result.divergence[:, 4] == INF).all()
    assert result.hard[4].isfinite() and result.weights[:, 4].isfinite().all()
    others = torch.arange(9) != 4
    for name in ("loss", "hard", "soft"):
        assert torch.equal(getattr(result, name)[others], getattr(clean, name)[others])
    assert torch.equal(result.grad[others], clean.grad[others])
    # The gradient stays finite: q is 0 there, which leaves the probability of the teachers.
    assert result.grad[4].isfinite().all() and result.grad[4, column] < 0
    total = run(case.with_(student=student, reduction="mean"), backend)
    assert total.loss == INF and total.hard.isfinite() and not total.grad.isnan().any()


@pytest.mark.parametrize("C", [2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 127, 2049])
def test_a_masked_class_is_seen_in_every_column(C, backend):
    # Row i masks only column i, which covers every lane of a vector, its tail and its overlap.
    rows = min(C, 150)
    columns = torch.arange(C - rows, C)
    case = make_case(rows, C, 2, reduction="none", temperature=3.0 if C % 4 == 1 else 4.0)
    student = case.student.scatter(1, columns.unsqueeze(1), -INF)
    case = case.with_(student=student, target=(columns + 1) % C)
    result = run(case, backend, torch.ones(rows))
    assert (result.divergence == INF).all() and (result.loss == INF).all()
    assert result.hard.isfinite().all() and result.grad.isfinite().all()
    # Masked in the teachers as well, the class contributes nothing.
    both = case.with_(teachers=tuple(z.scatter(1, columns.unsqueeze(1), -INF) for z in case.teachers))
    assert_result(run(both, backend, torch.ones(rows)), both, truth(both), naive(both))


def test_masked_label_has_infinite_hard_loss(backend):
    case = make_case(9, 33, reduction="none")
    student, teachers = case.student.clone(), [z.clone() for z in case.teachers]
    for z in (student, *teachers):
        z[2, int(case.target[2])] = -INF
    for hard_weight in (1.0, 0.0):
        spoiled = Case(student, tuple(teachers), case.target, reduction="none", hard_weight=hard_weight)
        result = run(spoiled, backend, torch.ones(9))
        assert result.hard[2] == INF and result.soft[2].isfinite()
        # A coefficient of 0 removes even an infinite term.
        assert result.loss[2] == (INF if hard_weight else result.soft[2])
        assert not result.grad.isnan().any() and not result.loss.isnan().any()
        assert_near(result.weights[:, 2], torch.full((3,), 1 / 3))


def with_infinite_ce(case: Case, which: list[int]) -> Case:
    """Teachers `which` give the label of row 0 probability 0."""
    teachers = [z.clone() for z in case.teachers]
    for k in which:
        teachers[k][0, int(case.target[0])] = -INF
    return case.with_(teachers=tuple(teachers))


@pytest.mark.parametrize("K", [2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, -1])
def test_infinite_cross_entropies_share_the_softmax_mass(K, count, backend):
    which = list(range(K))[: K if count == -1 else count]
    case = with_infinite_ce(make_case(4, 33, K), which)
    for weights, ce in (
        (run(case, backend).weights, run(case, backend).teacher_ce),
        confidence_weights(case.teachers, case.target, backend=backend),
    ):
        assert (ce[which, 0] == INF).all()
        mass = torch.zeros(K)
        mass[which] = 1 / len(which)
        assert_near(weights[:, 0], (1 - mass) / (K - 1))
        if len(which) == 1:
            assert weights[which[0], 0] == 0
    result = run(case, backend)
    assert result.loss.isfinite() and result.grad.isfinite().all()


def test_one_teacher_keeps_weight_one_with_an_infinite_cross_entropy(backend):
    case = with_infinite_ce(make_case(4, 33, 1), [0])
    result = run(case, backend)
    assert result.teacher_ce[0, 0] == INF and (result.weights == 1).all() and result.grad.isfinite().all()


def test_weight_zero_removes_an_infinite_divergence(backend):
    # Teacher 0 has infinite CE (weight 0) and puts its mass where the student is -inf (infinite KL).
    case = make_case(4, 33, 2, reduction="none")
    case = with_infinite_ce(case, [0])
    student = case.student.clone()
    column = (int(case.target[0]) + 1) % 33
    student[0, column] = -INF
    teachers = (case.teachers[0], case.teachers[1].clone())
    teachers[1][0, column] = -INF
    result = run(case.with_(student=student, teachers=teachers), backend, torch.ones(4))
    assert result.weights[:, 0].tolist() == [0.0, 1.0]
    assert result.divergence[0, 0] == INF and result.divergence[1, 0].isfinite()
    assert result.loss.isfinite().all() and result.grad.isfinite().all()


@pytest.mark.parametrize("way", ["eager", "compiled", "torch.func"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("soft_weight", "value", "expected"),
    [(1.0, -INF, [False, True, False]), (1.0, float("nan"), [False, True, False]), (0.0, -INF, [False] * 3)],
)
def test_the_gradient_of_given_weights_at_terms_that_count_for_nothing(
    soft_weight, value, expected, reduction, way, backend
):
    """It is 0 for a weight of 0 and a divergence that is not finite, and without a soft loss for all."""
    case = make_case(6, 10, temperature=2.0)
    student, teachers = case.student, [z.clone() for z in case.teachers]
    # An infinite divergence of teachers 0 and 1. Teacher 2 has no class 3 either.
    student[:, 3] = -INF
    teachers[2][:, 3] = -INF
    if value != value:
        teachers[0][:, 4] = value
    target = case.target % 3

    def loss(weights: torch.Tensor) -> torch.Tensor:
        settings = {"temperature": 2.0, "soft_weight": soft_weight, "weighting": weights, "reduction": reduction}
        return camkd_loss(student, teachers, target, backend=backend, **settings).loss.sum()

    weights = torch.tensor([0.0, 0.5, 0.0])
    if way == "torch.func":
        backend = "auto"  # the only one that takes such tensors
        gradient = torch.func.grad(loss)(weights)
    else:
        call = torch.compile(loss, backend="aot_eager") if way == "compiled" else loss
        call(weights.requires_grad_()).backward()
        gradient = weights.grad
    assert gradient.isinf().tolist() == expected and not gradient.isnan().any()
    assert gradient[0] == 0 and (gradient[2] > 0) == (soft_weight > 0)


def test_a_tiny_weight_keeps_an_infinite_divergence(backend):
    case = nearly_no_weight()
    result = run(case, backend, torch.ones(4))
    assert (result.weights[2] > 0).all() and (result.weights[2] < 1e-8).all()
    assert_near(result.weights[2], confidence_weights([z.double() for z in case.teachers], case.target)[0][2].float())
    assert (result.divergence[2] == INF).tolist() == [True, True, False, False]
    assert (result.loss == INF).tolist() == [True, True, False, False]


@pytest.mark.parametrize("value", [float("nan"), INF, -INF])
@pytest.mark.parametrize("C", [33, 5000])
def test_weight_zero_removes_a_teacher_of_any_content(C, value, backend):
    """Loss and gradient are those without the teacher."""
    weights = torch.tensor([0.5, 0.0, 0.25])
    case = make_case(4, C, weighting=weights)
    case.teachers[1].fill_(value)
    without = case.with_(teachers=case.teachers[::2], weighting=weights[::2])
    for evaluate in (run, run_value_and_grad):
        result, expected = evaluate(case, backend), evaluate(without, backend)
        for name in ("loss", "hard", "soft", "grad"):
            assert_near(getattr(result, name), getattr(expected, name))


def test_entropy_weights_of_certain_teachers_are_equal(backend):
    # One-hot teachers have entropy 0: each ratio is 1/K, so each weight (K-1)/K.
    case = make_case(4, 33, weighting="entropy")
    onehot = torch.full((4, 33), -INF).scatter(1, case.target.unsqueeze(1), 0.0)
    result = run(case.with_(teachers=(onehot,) * 3), backend)
    assert_near(result.weights, torch.full((3, 4), 2 / 3))
    assert result.grad.isfinite().all()


@pytest.mark.parametrize("scale", [1e3, 1e4, 3e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_huge_finite_logits(dtype, scale, backend):
    generator = torch.Generator().manual_seed(5)
    tensors = [(torch.rand(6, 100, generator=generator) * 2 - 1).mul(scale).to(dtype) for _ in range(4)]
    case = Case(tensors[0], tuple(tensors[1:]), torch.randint(100, (6,), generator=generator))
    R, N = truth(case), naive(case)
    result = run(case, backend)
    assert all(x.isfinite().all() for x in result if x is not None)
    assert_result(result, case, R, N)


def test_shift_of_a_row_changes_nothing(backend):
    case = make_case(9, 100, peaked=True)
    shifted = case.with_(student=case.student + 512, teachers=tuple(z - 256 for z in case.teachers))
    # Adding 512 rounds the logits, so R and N are computed from the shifted ones.
    ours: Result = run(shifted, backend)
    assert_accurate(ours.grad, truth(shifted).grad, naive(shifted).grad)
    assert_near(ours.loss, run(case, backend).loss, rtol=1e-4)


@pytest.mark.parametrize("K", [2, 6])
@pytest.mark.parametrize("of_student", [True, False])
def test_a_row_without_a_finite_logit_is_nan(of_student, K, backend):
    case = make_case(4, 70, K, reduction="none", padded=False)
    (case.student if of_student else case.teachers[1])[2] = -INF
    for result in (run(case, backend, torch.ones(4)), run_value_and_grad(case, backend)):
        assert result.loss.isnan().tolist() == [False, False, True, False]
        assert (
            result.grad.isnan().all(1).tolist() == result.grad.isnan().any(1).tolist() == result.loss.isnan().tolist()
        )


def test_nan_stays_in_its_row(backend):
    case = make_case(9, 33, reduction="none")
    student = case.student.clone()
    student[3, 5] = float("nan")
    result, clean = run(case.with_(student=student), backend, torch.ones(9)), run(case, backend, torch.ones(9))
    others = torch.arange(9) != 3
    assert result.loss[3].isnan() and result.grad[3].isnan().any()
    assert torch.equal(result.loss[others], clean.loss[others])
    assert torch.equal(result.grad[others], clean.grad[others])


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_mode_finds_nothing(backend):
    case = masked(make_case(5, 33), torch.arange(33) % 3 == 0)
    student = case.student.detach().requires_grad_()
    with torch.autograd.detect_anomaly():
        camkd_loss(student, case.teachers, case.target, backend=backend).loss.backward()
    assert student.grad.isfinite().all()
