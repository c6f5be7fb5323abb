"""The Triton backend under the interpreter, against the float64 truth and the edge conventions of the reference.

The interpreter takes milliseconds per row and operation. So cases have few rows, and there are one or two widths per
path (rows on chip, rows in column blocks, and the boundary), each with other options.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from camkd_fast import camkd_loss
from tests.support.cases import Case, make_case, nearly_no_weight
from tests.support.evaluate import run, run_value_and_grad
from tests.support.op_contract import (
    assert_a_factor_of_1_writes_nothing,
    assert_confidence,
    assert_confidence_edges,
    assert_counts_valid_rows,
    assert_feature_layouts,
    assert_feature_module,
    assert_features,
    assert_scales_rows,
)
from tests.support.row_contract import assert_agrees, assert_invalid_second_labels, assert_means, options
from tests.support.tolerance import assert_near, assert_result, rms, truncated
from tests.support.truth import naive, truth

pytest.importorskip("triton")
kernels = importlib.import_module("camkd_fast.kernels")
launch = importlib.import_module("camkd_fast.kernels.launch_table")
launcher, row_loss = (importlib.import_module(f"camkd_fast.kernels.{name}") for name in ("launcher", "row_loss"))

if os.environ.get("TRITON_INTERPRET") != "1":  # set by conftest.py without a GPU; with one tests/gpu runs
    pytest.skip("these cases are CPU tensors, which need TRITON_INTERPRET=1", allow_module_level=True)

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAN, INF = float("nan"), float("inf")
# Numpy warns where a masked lane or an ignored row computes inf - inf, which reaches no result.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def check(case: Case, what: str = "", grad_output: torch.Tensor | None = None) -> None:
    actual, R, N = run(case, "triton", grad_output), truth(case, grad_output), naive(case, grad_output)
    dtype = actual.grad.dtype
    R, N = (result._replace(grad=truncated(result.grad, dtype)) for result in (R, N))
    assert_result(actual, case, R, N, what)


@pytest.mark.parametrize(
    ("C", "K", "temperature", "weighting", "dtype"),
    [
        (1, 2, 4.0, "confidence", F32),
        (10, 16, 2.0, "confidence", F32),
        (10, 1, 4.0, "entropy", BF16),
        (100, 3, 4.0, "confidence", F32),
        (100, 2, 1.0, "entropy", F16),
        (100, 5, 2.5, "uniform", F32),
        (1000, 3, 20.0, "confidence", BF16),
        (1001, 3, 4.0, "entropy", F32),
    ],
)
@pytest.mark.parametrize("peaked", [False, True], ids=["noise", "peaked"])
def test_matches_truth(C: int, K: int, temperature: float, weighting: str, dtype: torch.dtype, peaked: bool) -> None:
    """The shipped launch of each width; padded cases have odd strides and unaligned slices."""
    case = make_case(5, C, K, dtype, peaked=peaked, ignored=0.2, temperature=temperature, weighting=weighting)
    check(case, f"C={C}")


@pytest.mark.parametrize(
    ("C", "K", "temperature", "weighting", "dtype"),
    [
        (9001, 3, 4.0, "entropy", F32),
        (16384, 1, 1.0, "confidence", F32),
        (21841, 2, 2.5, "confidence", BF16),
        (32000, 3, 4.0, "confidence", BF16),
    ],
)
def test_wide_rows_match_truth(C: int, K: int, temperature: float, weighting: str, dtype: torch.dtype) -> None:
    assert not launch.on_chip(K, C)
    options = {"temperature": temperature, "weighting": weighting}
    # Padded tensors begin at odd addresses and are read element by element.
    check(make_case(2, C, K, dtype, peaked=True, padded=C % 8 != 0, **options), f"C={C}")


@pytest.mark.parametrize("weighting", ["confidence", "uniform", "entropy", "given"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 2.5])
def test_every_weighting_both_regimes(regime: str, weighting: str, temperature: float) -> None:
    # Over fewer rows the error of eager PyTorch varies by chance.
    case = make_case(12, 72, 3, peaked=True, ignored=0.2, temperature=temperature, weighting=weighting, hard_weight=0.7)
    if weighting == "given":
        case = case.with_(weighting=torch.tensor([[0.2], [0.0], [0.9]]).expand(3, case.student.shape[0]).contiguous())
    check(case, f"{regime} {weighting}")


@pytest.mark.parametrize("weighting", ["confidence", "uniform", "entropy"])
@pytest.mark.parametrize("peaked", [False, True], ids=["noise", "peaked"])
def test_two_labels(regime: str, weighting: str, peaked: bool) -> None:
    case = make_case(12, 72, 3, peaked=peaked, ignored=0.2, weighting=weighting, temperature=2.5, two_labels=True)
    check(case, f"{regime} {weighting}")


def test_rows_of_one_label_among_two(regime: str) -> None:
    """By shares of 0 and 1 or equal labels, to the bit; logits at a label without a share do not count."""
    case = make_case(6, 40, 2, padded=False, reduction="none")
    label, other = case.target, (case.target + 1) % 40
    one = torch.tensor([True, False, True, False, True, False])
    student = case.student.scatter(1, other.unsqueeze(1), -INF)
    case = case.with_(student=student, teachers=tuple(z.scatter(1, other.unsqueeze(1), -INF) for z in case.teachers))
    mixed = case.with_(target=label.where(one, other), second_target=other.where(one, label), mix=one.to(torch.float32))
    expected = run(case, "triton", torch.ones(6))
    for changed in (mixed, case.with_(second_target=label, mix=torch.rand(6))):
        for ours, theirs in zip(run(changed, "triton", torch.ones(6))[:7], expected[:7], strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("label", [-1, 40, -100, 7])
def test_invalid_second_labels_are_nan(regime: str, label: int) -> None:
    assert_invalid_second_labels(kernels, label)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_reductions(regime: str, reduction: str) -> None:
    case = make_case(4, 40, 2, ignored=0.3, reduction=reduction)
    check(case, reduction, torch.randn(4) if reduction == "none" else torch.tensor(0.3))


def test_mixed_dtypes(regime: str) -> None:
    check(make_case(3, 72, 3, BF16, teacher_dtypes=(F32, F16, BF16), peaked=True), regime)


@pytest.mark.parametrize("C", [40, 44, 42])
def test_alignments(regime: str, C: int) -> None:
    """Row strides that are multiples of 8, 4 and 2 elements; most other cases are read element by element."""
    check(make_case(3, C, 2, BF16, peaked=True, padded=False), f"{regime} C={C}")


@pytest.mark.parametrize("stride", [41, 42, 44])
def test_row_strides_that_are_less_aligned_than_the_width(regime: str, stride: int) -> None:
    """The first row is aligned, and 40 columns are five vectors, but the rows after it begin in between."""
    case = make_case(5, 40, 2, padded=False)
    student, *teachers = (
        torch.cat([z, torch.full((5, stride - 40), NAN)], 1)[:, :40] for z in (case.student, *case.teachers)
    )
    check(case.with_(student=student), f"{regime} student")
    check(case.with_(teachers=(case.teachers[0], teachers[1])), f"{regime} a teacher")
    wide = [z.repeat(2, 1)[::2] for z in (student, *teachers)]
    check(case.with_(student=wide[0], teachers=tuple(wide[1:])), f"{regime} all")


@pytest.mark.parametrize("K", [1, 2, 5, 16])
def test_number_of_teachers(regime: str, K: int) -> None:
    check(make_case(2, 40, K, peaked=True, weighting="entropy" if K == 5 else "confidence"), f"{regime} K={K}")


def test_two_row_strides(regime: str) -> None:
    """(B, S, C) slices that no single row stride describes are read in place, each with its own strides."""
    case = make_case(6, 24, 3, lead=(2, 3), padded=False)
    wide = torch.full((2, 5, 32), NAN)
    wide[:, 1:4, 8:] = case.student
    check(case.with_(student=wide[:, 1:4, 8:], teachers=(*case.teachers[:2], case.teachers[2][:1].expand(2, 3, 24))))


def test_value_and_grad(regime: str) -> None:
    case = make_case(3, 40, 2)
    factor = torch.tensor(8.0)
    assert_result(run_value_and_grad(case, "triton", 8.0), case, truth(case, factor), naive(case, factor), scale=8.0)


# --- edges -----------------------------------------------------------------------------------------------------------


agree = functools.partial(assert_agrees, kernels.row_loss)


@pytest.fixture
def rows() -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    return torch.randn(4, 70), [3 * torch.randn(4, 70) for _ in range(3)], torch.tensor([3, 69, 0, 40])


@pytest.mark.parametrize("weighting", ["confidence", "entropy", "uniform"])
def test_masked_columns(regime: str, rows: tuple, weighting: str) -> None:
    student, teachers, target = rows
    for tensor in (student, *teachers):
        tensor[:, 30:66] = -INF  # the second block of 32 columns and parts of the others
    target[3] = 68
    agree(student, teachers, target, weighting=weighting)
    student[0, 67] = -INF  # teachers have mass there, so KL is infinite, in that row only
    agree(student, teachers, target, weighting=weighting)


def test_columns_masked_with_the_lowest_number(regime: str, rows: tuple) -> None:
    student, teachers, target = rows
    for tensor in (student, *teachers):
        tensor[:, 4:39] = torch.finfo(F32).min
        tensor[2] = torch.finfo(F32).min
    agree(student, teachers, target)


@pytest.mark.parametrize("lowest", [(1, 2, 3), (0,), (2,)], ids=["teachers", "student", "one teacher"])
@pytest.mark.parametrize("temperature", [1.0, 2.5, 4.0])
def test_blocks_masked_with_infinity_and_with_the_lowest_number(
    regime: str, rows: tuple, temperature: float, lowest: tuple[int, ...]
) -> None:
    """The first block is masked: there the running maximum is the mask itself, whose sums must vanish later."""
    student, teachers, _ = rows
    for i, tensor in enumerate((student, *teachers)):
        tensor[:, :40] = torch.finfo(F32).min if i in lowest else -INF
    agree(student, teachers, torch.tensor([43, 69, 50, 60]), temperature=temperature)


def test_infinite_cross_entropies(regime: str, rows: tuple) -> None:
    student, teachers, target = rows
    teachers[0][0, 3] = -INF  # one: weight 0
    teachers[0][1, 69] = teachers[2][1, 69] = -INF  # two share the mass
    for z in teachers:
        z[2, 0] = -INF  # all: uniform
    agree(student, teachers, target)


def test_min_ce_of_a_nan_is_nan(regime: str, rows: tuple) -> None:
    student, teachers, target = rows
    teachers[1][1, 3], teachers[0][2, 3] = NAN, NAN
    agree(student, teachers, target, weighting="min_ce")


def test_a_tiny_weight_keeps_an_infinite_divergence(regime: str) -> None:
    case = nearly_no_weight()
    agree(case.student, list(case.teachers), case.target)


def test_certain_teachers(regime: str) -> None:
    """Entropies of exactly 0, in all teachers and in all but the last."""
    target = torch.tensor([1, 2])
    teachers = [torch.full((2, 40), -INF).scatter_(1, target[:, None], 5.0) for _ in range(3)]
    teachers[2][1] = torch.randn(40)
    student = torch.randn(2, 40)
    agree(student, teachers, target, weighting="entropy")


def test_ignored_rows_are_zero_whatever_they_contain(regime: str, rows: tuple) -> None:
    student, teachers, target = rows
    target[1] = target[3] = -100
    student[1], teachers[0][1], teachers[2][3] = NAN, NAN, INF
    agree(student, teachers, target)
    target.fill_(-100)
    agree(student, teachers, target)


def test_labels_out_of_range_give_nan_rows(regime: str, rows: tuple) -> None:
    student, teachers, target = rows
    target[0], target[2] = 70, -1
    agree(student, teachers, target)
    agree(student, teachers, target, hard_weight=0.0, weighting="uniform")


def test_given_weight_of_zero_silences_a_teacher(regime: str, rows: tuple) -> None:
    """Loss and gradient are those without the teacher, even if its logits are NaN."""
    student, teachers, target = rows
    teachers[1].fill_(NAN)
    weights = torch.tensor([0.5, 0.0, 0.25]).unsqueeze(1).expand(3, 4)
    actual = kernels.row_loss(student, teachers, target, **options(weighting=weights))
    without = kernels.row_loss(student, teachers[::2], target, **options(weighting=weights[::2]))
    assert_near(actual.row_stats[:3], without.row_stats[:3])
    assert_near(actual.grad_student, without.grad_student)


@pytest.mark.parametrize("layout", ["per teacher", "transposed", "every other row"])
def test_given_weights_of_any_strides(rows: tuple, layout: str) -> None:
    weights = {
        "per teacher": torch.rand(3, 1).expand(3, 4),
        "transposed": torch.rand(4, 3).t(),
        "every other row": torch.rand(3, 8)[:, ::2],
    }[layout]
    agree(*rows, weighting=weights)


@pytest.mark.parametrize("offset", [1e4, -3e4])
def test_large_offsets_do_not_cancel(regime: str, rows: tuple, offset: float) -> None:
    """A whole number added to logits on a grid of 1/32 changes nothing, bit for bit."""
    student, teachers, target = rows
    student, *teachers = ((32 * tensor).round() / 32 for tensor in (student, *teachers))
    one = kernels.row_loss(student, teachers, target, **options())
    moved = kernels.row_loss(student + offset, [z + offset for z in teachers], target, **options())
    assert torch.equal(one.row_stats, moved.row_stats)
    assert torch.equal(one.grad_student, moved.grad_student)


@pytest.mark.parametrize("weighting", ["confidence", "uniform"])
def test_student_equal_to_teachers(regime: str, rows: tuple, weighting: str) -> None:
    student, _, target = rows
    result = kernels.row_loss(student, [student] * 3, target, **options(hard_weight=0.0, weighting=weighting))
    assert torch.equal(result.divergence, torch.zeros(3, 4))
    # The terms that cancel are each rounded once.
    assert rms(result.grad_student) <= 4 * torch.finfo(F32).eps * rms(4.0 * (student / 4.0).softmax(1))


def test_scaled_gradient_and_no_gradient(regime: str, rows: tuple) -> None:
    one = kernels.row_loss(*rows, **options())
    for scale in (0.125, torch.tensor([0.125])):
        scaled = kernels.row_loss(*rows, **options(grad_scale=scale))
        assert_near(scaled.grad_student, one.grad_student * 0.125)
    bare = kernels.row_loss(*rows, **options(needs_grad=False))
    assert bare.grad_student is None
    assert torch.equal(bare.row_stats, one.row_stats)


WAYS = {
    "one launch": launch.BatchLaunch("here", True, 32),
    "counted before": launch.BatchLaunch("before", True, 32),
    "three launches": launch.BatchLaunch("before", False, 32),
    "by torch": None,
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The ways to a mean, for the same few rows."""
    if WAYS[request.param] is None:
        monkeypatch.setattr(row_loss, "BATCH_ROWS", 2)
    else:
        monkeypatch.setattr(row_loss, "batch_launch", lambda N, programs, num_warps: WAYS[request.param])
    row_loss.row_launcher.cache_clear()
    yield str(request.param)
    row_loss.row_launcher.cache_clear()


@pytest.mark.parametrize("scale", [8.0, torch.tensor([8.0])], ids=["number", "tensor"])
def test_means(rows: tuple, scale: float | torch.Tensor, way: str, regime: str) -> None:
    """With `mean` the kernels count the rows that are not ignored."""
    assert_means(kernels.row_loss, *rows, scale)


@pytest.mark.parametrize(("N", "launches"), [(1, 1), (33, 1), (2049, 2)])
def test_launches_of_a_mean(N: int, launches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeated, because the second call finds the counter that the first one left."""
    launched: list[int] = []
    kind = launcher.Launcher
    original = kind.__call__
    monkeypatch.setattr(
        launcher.Launcher, "__call__", lambda self, *given: launched.append(1) or original(self, *given)
    )
    student, target = torch.randn(N, 3), torch.randint(3, (N,))
    target[::3] = -100
    means = [kernels.row_loss(student, [student.flip(0)], target, **options(mean=True)) for _ in range(2)]
    assert len(launched) == 2 * launches
    valid = int((target != -100).sum())
    for mean in means:
        expected = mean.row_stats[:3].double().sum(1) / max(valid, 1)
        assert mean.means[1][2] == torch.tensor(1.0) / max(valid, 1)
        assert_near(torch.stack([mean.means[0], *mean.means[1][:2]]), expected.float())
    assert all(torch.equal(one, two) for one, two in zip(means[0].means, means[1].means, strict=True))


@pytest.mark.parametrize(("reduction", "num_items"), [("sum", None), ("mean", 3.0)])
def test_sums_in_the_launch_of_the_rows(reduction: str, num_items: float | None, regime: str) -> None:
    """If the divisor is known, or there is none, one launch is all there is."""
    case = make_case(5, 40, 2, ignored=0.3, reduction=reduction, num_items=num_items, padded=False)
    launched = mock.Mock(side_effect=launcher.Launcher.__call__, autospec=True)
    with mock.patch.object(launcher.Launcher, "__call__", lambda self, *given: launched(self, *given)):
        check(case, reduction)
    (launch,) = launched.call_args_list
    assert launch.args[-1].tolist() == [0]  # the counter of the launch, which has added up


def test_sums_of_rows(rows: tuple, way: str, regime: str) -> None:
    """`total_scale` has no effect on the gradient; batches that are not added up in the launch are the caller's."""
    sums = kernels.row_loss(*rows, **options(total_scale=0.25, grad_scale=2.0))
    bare = kernels.row_loss(*rows, **options(grad_scale=2.0))
    assert torch.equal(sums.row_stats, bare.row_stats) and torch.equal(sums.grad_student, bare.grad_student)
    assert bare.means is None
    if way in ("one launch", "counted before"):
        loss, others = sums.means
        assert_near(torch.stack([loss, *others[:2]]), (bare.row_stats[:3].double().sum(1) / 4).float())
        assert others[2] == 0.25
    elif way == "three launches":
        assert sums.means is None


def test_means_without_gradient_are_the_same(rows: tuple, way: str) -> None:
    one, other = (kernels.row_loss(*rows, **options(mean=True, needs_grad=grad)) for grad in (True, False))
    assert other.grad_student is None
    assert torch.equal(one.means[0], other.means[0]) and torch.equal(one.means[1], other.means[1])


def test_no_rows() -> None:
    empty = torch.empty(0, 7)
    result = kernels.row_loss(empty, [empty, empty], torch.empty(0, dtype=torch.int64), **options())
    assert result.row_stats.shape == (9, 0) and result.grad_student.shape == (0, 7)
    result = kernels.row_loss(empty, [empty, empty], torch.empty(0, dtype=torch.int64), **options(mean=True))
    assert result.means[0] == 0 and result.means[1].tolist() == [0, 0, 1]
    assert kernels.feature_forward([empty], [empty]).shape == (1, 0)
    assert kernels.scale_rows(empty, torch.ones(1), empty) is empty


def test_repeats_bit_for_bit_and_writes_no_input(regime: str, rows: tuple) -> None:
    student, teachers, target = rows
    before = [tensor.clone() for tensor in (student, *teachers, target)]
    first, second = (kernels.row_loss(*rows, **options()) for _ in range(2))
    assert torch.equal(first.row_stats, second.row_stats) and torch.equal(first.grad_student, second.grad_student)
    assert all(torch.equal(old, new) for old, new in zip(before, (student, *teachers, target), strict=True))


def test_all_rows_ignored_keep_the_graph() -> None:
    student = torch.randn(2, 10, requires_grad=True)
    out = camkd_loss(student, [torch.randn(2, 10)], torch.full((2,), -100), backend="triton")
    out.loss.backward()
    assert out.loss == 0 and torch.equal(student.grad, torch.zeros(2, 10))


# --- the other ops ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("C", [10, 101, 3000])
def test_confidence(C: int) -> None:
    """An ignored row of NaN, mixed dtypes and a padded slice."""
    wide = torch.full((4, C + 8), NAN)
    logits = [3 * torch.randn(4, C), wide[:, :C].copy_(3 * torch.randn(4, C)), 3 * torch.randn(4, C).to(BF16)]
    logits[0][2] = NAN
    assert_confidence(kernels, logits, torch.randint(C, (4,)), truncated)


def test_confidence_edges() -> None:
    assert_confidence_edges(kernels)


def test_features() -> None:
    """Teachers of different widths, dtypes and row strides."""
    student = [torch.randn(3, 100), torch.randn(3, 4100).to(BF16), torch.randn(3, 40)[:, :33]]
    teachers = [torch.randn(3, 100).to(F16), torch.randn(3, 4100), torch.randn(3, 33)]
    assert_features(kernels, student, teachers, truncated)


@pytest.mark.parametrize(
    ("first", "second"),
    [("contiguous",) * 2, ("channels_last",) * 2, ("channels_last", "contiguous"), ("columns", "expanded")],
)
def test_feature_layouts(first: str, second: str) -> None:
    assert_feature_layouts(kernels, first, second, truncated)


def test_confidence_counts_valid_rows() -> None:
    assert_counts_valid_rows(kernels, 10)


def test_feature_loss_module() -> None:
    assert_feature_module("triton")


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("C", [10, 101])
def test_scale_rows(dtype: torch.dtype, C: int) -> None:
    assert_scales_rows(kernels, C, dtype, truncated)


def test_a_factor_of_1_writes_nothing() -> None:
    assert_a_factor_of_1_writes_nothing(kernels)
