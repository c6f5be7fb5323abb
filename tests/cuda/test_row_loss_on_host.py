"""The CUDA kernels of the logit loss, executed on the host, against the float64 truth and the reference.

tests/cuda/host/ defines the names of csrc/cuda/device.cuh for g++: a fiber per CUDA thread, barriers of
threads, shared memory full of NaN, asynchronous copies that happen only when they are waited for. The launch table is
the shipped one. The tests reduce the limits of the emulated device, so that small rows take the paths of large ones.

Not covered: the weaker memory order of a GPU (test_races.py looks for missing barriers), the last bits of the
approximate exponential in hardware, register and shared memory limits (test_offline_compile.py), launch attributes,
streams and speed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from tests.support.cases import Case, make_case, nearly_no_weight
from tests.support.evaluate import run, run_value_and_grad
from tests.support.row_contract import assert_agrees, assert_invalid_second_labels, assert_means, options, second_of
from tests.support.tolerance import assert_near, assert_result, rms
from tests.support.truth import naive, truth

pytest.importorskip("camkd_fast._C")
pytest.importorskip("pybind11")
from camkd_fast.backends import cuda as cuda_backend
from tests.cuda.host.on_host import cuda_on_the_host, emulated, enter, limit

__all__ = ["cuda_on_the_host", "emulated"]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAN, INF = float("nan"), float("inf")
REGIMES = ["table", "cluster", "cooperative", "pipelined", "chunks"]
WIDE = 1000  # columns of four blocks on the reduced device: one read by a cluster is cheaper than two by a block


@pytest.fixture(params=REGIMES)
def regime(request: pytest.FixtureRequest, emulated: ModuleType) -> Iterator[str]:
    """Checks after the test that it ran in this regime: the launch table might have chosen another."""
    yield str(request.param)
    _, chunks, blocks, cooperative, pipelined = emulated.last_rows()
    if request.param != "table":
        found = "chunks" if chunks > 1 else "cooperative" if cooperative else "cluster" if blocks > 1 else "block"
        # The pipelined kernel has only the formulas of the fast path
        if request.param == "pipelined":
            assert pipelined or found in ("cooperative", "block")
        else:
            assert found == request.param


def check(case: Case, what: str = "", grad_output: torch.Tensor | None = None) -> None:
    actual, R, N = run(case, "cuda", grad_output), truth(case, grad_output), naive(case, grad_output)
    assert_result(actual, case, R, N, what)


# --- every path through the kernel ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("C", "K", "temperature", "weighting", "dtype"),
    [
        (1, 2, 4.0, "confidence", F32),
        (7, 1, 4.0, "entropy", BF16),
        (10, 16, 2.0, "confidence", F32),
        (100, 3, 4.0, "confidence", BF16),
        (100, 2, 1.0, "entropy", F16),
        (100, 5, 3.3, "uniform", F32),
        (100, 4, 2.0, "uniform", F16),
        (1000, 3, 4.0, "confidence", BF16),
        (1000, 3, 3.3, "confidence", F32),
        (1128, 5, 4.0, "entropy", F16),
        (1128, 16, 1.0, "confidence", BF16),
    ],
)
@pytest.mark.parametrize("padded", [False, True], ids=["dense", "padded"])
def test_matches_truth(C: int, K: int, temperature: float, weighting: str, dtype: torch.dtype, padded: bool) -> None:
    """The shipped launch of each width; dense odd widths have unaligned rows, padded ones NaN around them."""
    case = make_case(
        7, C, K, dtype, peaked=padded, padded=padded, ignored=0.2, temperature=temperature, weighting=weighting
    )
    check(case, f"C={C}")


@pytest.mark.parametrize(
    ("regime", "C", "K", "temperature", "weighting", "dtype", "expected"),
    [
        ("table", 2100, 3, 4.0, "confidence", BF16, (False, 1, 1, False, False)),
        ("cluster", 1001, 3, 4.0, "confidence", BF16, (False, 1, 2, False, False)),
        ("cluster", 1000, 5, 3.3, "entropy", F32, (False, 1, 4, False, False)),
        ("cluster", 3999, 2, 2.0, "confidence", F16, (False, 1, 8, False, False)),
        ("cluster", 1001, 4, 1.0, "uniform", F16, (False, 1, 2, False, False)),
        ("cooperative", 1001, 3, 4.0, "confidence", BF16, (False, 1, 2, True, False)),
        ("cooperative", 1537, 3, 4.0, "confidence", BF16, (False, 1, 4, True, False)),
        ("cooperative", 2500, 1, 1.0, "confidence", F16, (False, 1, 3, True, False)),
        ("cooperative", 1000, 5, 3.3, "entropy", F32, (False, 1, 4, True, False)),
        ("pipelined", 1001, 3, 4.0, "confidence", BF16, (False, 1, 2, True, True)),
        ("pipelined", 900, 3, 2.0, "confidence", F32, (False, 1, 4, True, True)),
        ("pipelined", 2000, 1, 1.0, "confidence", F16, (False, 1, 2, True, True)),
        ("pipelined", 1000, 5, 4.0, "uniform", F32, (False, 1, 4, True, True)),
        ("chunks", 1001, 3, 4.0, "confidence", BF16, (False, 2, 1, False, False)),
        ("chunks", 1127, 5, 3.3, "entropy", F32, (False, 5, 1, False, False)),
        ("chunks", 3999, 1, 1.0, "confidence", F16, (False, 4, 1, False, False)),
    ],
)
@pytest.mark.parametrize("padded", [False, True], ids=["dense", "padded"])
def test_wide_rows(
    emulated: ModuleType,
    regime: str,
    C: int,
    K: int,
    temperature: float,
    weighting: str,
    dtype: torch.dtype,
    expected: tuple[bool, int, int, bool, bool],
    padded: bool,
) -> None:
    enter(emulated, regime, K)
    case = make_case(
        5, C, K, dtype, peaked=True, padded=padded, ignored=0.3, temperature=temperature, weighting=weighting
    )
    check(case, f"{regime} C={C}")
    assert emulated.last_rows() == expected


@pytest.mark.parametrize(("K", "temperature", "weighting"), [(2, 4.0, "entropy"), (3, 3.3, "confidence")])
def test_more_blocks_than_a_warp_has_lanes(emulated: ModuleType, K: int, temperature: float, weighting: str) -> None:
    limit(emulated, (K + 1) * 4096 + 12 * 1024, cluster=1, multiprocessors=36, least_cooperative=33)
    case = make_case(2, 36 * 1024, K, temperature=temperature, weighting=weighting, padded=False)
    check(case)
    assert emulated.last_rows()[2] > 32


@pytest.mark.parametrize("two_labels", [False, True])
@pytest.mark.parametrize("N", [4, 37, 71])
def test_long_pipelines(emulated: ModuleType, N: int, two_labels: bool) -> None:
    """Two groups take up to 36 rows each, of which 16 are prepared: ignored ones, and labels far from the maximum."""
    enter(emulated, "pipelined", 3)
    case = make_case(N, 1001, 3, BF16, padded=False, ignored=0.3, two_labels=two_labels)
    for z in (case.student, *case.teachers):
        z[::3, 5] = 300.0
        z[1::5, 7] = 200.0
    check(case)
    assert emulated.last_rows() == (False, 1, 2, True, True)


@pytest.mark.parametrize(
    ("regime", "weighting"), [("cooperative", "confidence"), ("cooperative", "entropy"), ("pipelined", "confidence")]
)
def test_a_block_that_lags_behind_its_cooperative_group(emulated: ModuleType, regime: str, weighting: str) -> None:
    """It reads the messages of a row when the other block has long sent that of the next one."""
    enter(emulated, regime, 3)
    emulated.set_lagging(1)
    try:
        check(make_case(12, 1001, 3, BF16, weighting=weighting))
    finally:
        emulated.set_lagging(-1)
    assert emulated.last_rows() == (False, 1, 2, True, regime == "pipelined")


@pytest.mark.parametrize("weighting", ["confidence", "uniform", "entropy", "given"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, 3.3])
def test_every_weighting_and_temperature(emulated: ModuleType, regime: str, weighting: str, temperature: float) -> None:
    enter(emulated, regime, 3)
    C = 72 if regime == "table" else WIDE
    # The entropy of a nearly certain teacher, log(1 + tiny), is mostly rounding error in float32.
    peaked = weighting != "entropy"
    case = make_case(
        12,
        C,
        3,
        peaked=peaked,
        padded=False,
        ignored=0.2,
        temperature=temperature,
        weighting=weighting,
        hard_weight=0.7,
    )
    if weighting == "given":
        case = case.with_(weighting=torch.tensor([[0.2], [0.0], [0.9]]).expand(3, 12).contiguous())
    check(case, f"{regime} {weighting}")


@pytest.mark.parametrize("peaked", [False, True], ids=["noise", "peaked"])
@pytest.mark.parametrize(
    ("K", "temperature", "weighting", "dtype"),
    [
        (3, 4.0, "confidence", F32),
        (5, 1.0, "confidence", BF16),
        (2, 2.0, "uniform", F16),
        (2, 3.3, "confidence", F32),
        (4, 4.0, "entropy", BF16),
    ],
)
def test_two_labels(
    emulated: ModuleType, regime: str, K: int, temperature: float, weighting: str, dtype: torch.dtype, peaked: bool
) -> None:
    enter(emulated, regime, K)
    options = {"temperature": temperature, "weighting": weighting, "hard_weight": 0.7}
    case = make_case(7, WIDE + 1, K, dtype, peaked=peaked, padded=peaked, ignored=0.2, two_labels=True, **options)
    check(case, f"{regime} {weighting}")


@pytest.mark.parametrize("K", [1, 16])
def test_two_labels_of_other_numbers_of_teachers(K: int) -> None:
    check(make_case(7, 100, K, ignored=0.2, two_labels=True))


@pytest.mark.parametrize("temperature", [4.0, 3.3])
def test_rows_of_one_label_among_two(emulated: ModuleType, regime: str, temperature: float) -> None:
    """By shares of 0 and 1 or equal labels, to the bit; logits at a label without a share do not count."""
    enter(emulated, regime, 3)
    case = make_case(6, WIDE, 3, padded=False, reduction="none", temperature=temperature)
    label, other = case.target, (case.target + 1) % WIDE
    one = torch.arange(6) % 2 == 0
    student = case.student.scatter(1, other.unsqueeze(1), -INF)
    case = case.with_(student=student, teachers=tuple(z.scatter(1, other.unsqueeze(1), -INF) for z in case.teachers))
    mixed = case.with_(target=label.where(one, other), second_target=other.where(one, label), mix=one.float())
    expected = run(case, "cuda", torch.ones(6))
    for changed in (mixed, case.with_(second_target=label, mix=torch.rand(6))):
        for ours, theirs in zip(run(changed, "cuda", torch.ones(6))[:7], expected[:7], strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("which", [0, 1])
def test_a_masked_label_of_two_is_infinite(emulated: ModuleType, regime: str, which: int) -> None:
    """In one teacher, in row 2 in the student too. Row 4 has labels far below the maximum, which the fast path cannot
    take."""
    enter(emulated, regime, 3)
    case = make_case(6, WIDE, 3, padded=False, two_labels=True)
    second = second_of(case)
    assert second is not None
    student, *teachers = (z.clone() for z in (case.student, *case.teachers))
    second.mix.fill_(0.25)
    second.target.copy_((case.target + 3) % WIDE)
    columns = torch.stack([case.target, second.target])
    for z in (student, teachers[0]):
        z[2, columns[which, 2]] = -INF
        z[4, columns[:, 4]] = -300.0
    teachers[1][0, columns[which, 0]] = -INF
    agree(student, teachers, case.target, second=second)


@pytest.mark.parametrize("label", [-1, 40, -100, 7])
def test_invalid_second_labels_are_nan(label: int) -> None:
    assert_invalid_second_labels(cuda_backend, label)


@pytest.mark.parametrize("layout", ["per teacher", "transposed", "every other row"])
def test_given_weights_of_any_strides(layout: str) -> None:
    weights = {
        "per teacher": torch.rand(3, 1).expand(3, 12),
        "transposed": torch.rand(12, 3).t(),
        "every other row": torch.rand(3, 24)[:, ::2],
    }[layout]
    case = make_case(12, 72, 3, padded=False)
    agree(case.student, list(case.teachers), case.target, weighting=weights)


@pytest.mark.parametrize("teacher_dtypes", [(F32, F16, BF16), (F16, F16, F16)], ids=["three", "one"])
def test_mixed_dtypes(emulated: ModuleType, regime: str, teacher_dtypes: tuple[torch.dtype, ...]) -> None:
    enter(emulated, regime, 3)
    check(make_case(4, WIDE, 3, BF16, teacher_dtypes=teacher_dtypes, peaked=True), regime)


def test_several_rows_per_warp(emulated: ModuleType) -> None:
    """Two rows at a time, the last pair incomplete, and more pairs than warps."""
    limit(emulated, multiprocessors=1)
    case = make_case(43, 33, 2, BF16, padded=False, ignored=0.3)
    assert emulated.row_geometry(43, 33, 2, 8)[:2] == (True, 2)
    check(case)


def test_two_row_strides(emulated: ModuleType, regime: str) -> None:
    """(B, S, C) slices that no single row stride describes are read in place, each with its own strides."""
    enter(emulated, regime, 3)
    case = make_case(6, WIDE, 3, lead=(2, 3), padded=False)
    wide = torch.full((2, 5, WIDE + 8), NAN)
    wide[:, 1:4, 8:] = case.student
    check(case.with_(student=wide[:, 1:4, 8:], teachers=(*case.teachers[:2], case.teachers[2][:1].expand(2, 3, WIDE))))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_gradient_aligned_unlike_the_logits(emulated: ModuleType, regime: str, dtype: torch.dtype) -> None:
    """Rows of the logits begin at 16-byte boundaries, those of the dense gradient do not."""
    enter(emulated, regime, 3)
    case = make_case(5, WIDE + 1, 3, dtype, padded=False, ignored=0.2)
    wide = [torch.full((5, WIDE + 16), NAN, dtype=dtype) for _ in range(4)]
    for buffer, logits in zip(wide, (case.student, *case.teachers), strict=True):
        buffer[:, : WIDE + 1] = logits
    student, *teachers = (buffer[:, : WIDE + 1] for buffer in wide)
    check(case.with_(student=student, teachers=tuple(teachers)))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_reductions(reduction: str) -> None:
    case = make_case(4, 40, 2, ignored=0.3, reduction=reduction)
    check(case, reduction, torch.randn(4) if reduction == "none" else torch.tensor(0.3))


@pytest.mark.parametrize("scale", [8.0, torch.tensor([8.0])], ids=["number", "tensor"])
def test_value_and_grad(emulated: ModuleType, regime: str, scale: float | torch.Tensor) -> None:
    enter(emulated, regime, 2)
    case = make_case(3, WIDE, 2)
    factor = torch.tensor(8.0)
    R, N = truth(case, factor), naive(case, factor)
    assert_result(run_value_and_grad(case, "cuda", scale), case, R, N, scale=8.0)


# --- edges -----------------------------------------------------------------------------------------------------------


agree = functools.partial(assert_agrees, cuda_backend.row_loss)


@pytest.fixture
def rows(emulated: ModuleType, regime: str) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    enter(emulated, regime, 3)
    return torch.randn(4, WIDE), [3 * torch.randn(4, WIDE) for _ in range(3)], torch.tensor([3, WIDE - 1, 0, 40])


@pytest.mark.parametrize("scale", [8.0, torch.tensor([8.0])], ids=["number", "tensor"])
def test_means(rows: tuple, scale: float | torch.Tensor) -> None:
    """The device counts the rows and reduces them."""
    assert_means(cuda_backend.row_loss, rows[0], rows[1], rows[2], scale)


@pytest.mark.parametrize("scale", [8.0, torch.tensor([8.0])], ids=["number", "tensor"])
@pytest.mark.parametrize("N", [0, 4, 300])
@pytest.mark.parametrize("device", REGIMES)
def test_means_of_narrow_rows(emulated: ModuleType, device: str, N: int, scale: float | torch.Tensor) -> None:
    """In one launch where one cluster handles the batch, otherwise in three."""
    enter(emulated, device, 3)
    student, *teachers = torch.randn(4, N, 40).unbind()
    assert_means(cuda_backend.row_loss, student, teachers, torch.randint(40, (N,)), scale)


@pytest.mark.parametrize("weighting", ["confidence", "entropy"])
def test_masked_columns(rows: tuple, weighting: str) -> None:
    student, teachers, target = rows
    for tensor in (student, *teachers):
        tensor[:, 41:900] = -INF  # whole vectors, whole warps and a whole batch of vectors
    agree(student, teachers, target, weighting=weighting)
    student[0, 20] = -INF  # teachers have mass there, so KL is infinite, in that row only
    agree(student, teachers, target, weighting=weighting)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 0.7])
def test_columns_masked_with_the_lowest_number(rows: tuple, temperature: float) -> None:
    """Some columns of every row, and all of one row; at a small T their product with the scale overflows."""
    student, teachers, target = rows
    for tensor in (student, *teachers):
        tensor[:, 41:900] = torch.finfo(F32).min
        tensor[2] = torch.finfo(F32).min
    agree(student, teachers, target, temperature=temperature)
    agree(student, teachers, target, temperature=temperature, weighting="entropy")


@pytest.mark.parametrize("lowest", [(1, 2, 3), (0,), (2,)], ids=["teachers", "student", "one teacher"])
def test_blocks_masked_with_infinity_and_with_the_lowest_number(rows: tuple, lowest: tuple[int, ...]) -> None:
    """The first columns are masked: there the running maximum is the mask itself, whose sums must vanish later."""
    student, teachers, _ = rows
    for i, tensor in enumerate((student, *teachers)):
        tensor[:, :700] = torch.finfo(F32).min if i in lowest else -INF
    for weighting in ("confidence", "entropy"):
        agree(student, teachers, torch.tensor([700, WIDE - 1, 800, 900]), weighting=weighting)


def test_infinite_cross_entropies(rows: tuple) -> None:
    student, teachers, target = rows
    teachers[0][0, 3] = -INF  # one: weight 0
    teachers[0][1, -1] = teachers[2][1, -1] = -INF  # two share the mass
    for z in teachers:
        z[2, 0] = -INF  # all: uniform
    agree(student, teachers, target)


@pytest.mark.parametrize("temperature", [4.0, 0.7])
@pytest.mark.parametrize("which", [0, 2], ids=["student", "teacher"])
def test_rows_without_a_finite_logit(rows: tuple, which: int, temperature: float) -> None:
    student, teachers, target = rows
    (student, *teachers)[which][1] = -INF
    agree(student, teachers, target, temperature=temperature)


def test_a_tiny_weight_keeps_an_infinite_divergence() -> None:
    case = nearly_no_weight()
    agree(case.student, list(case.teachers), case.target)


def test_certain_teachers() -> None:
    """Entropies of exactly 0, in all teachers and in all but the last."""
    target = torch.tensor([1, 2])
    teachers = [torch.full((2, 40), -INF).scatter_(1, target[:, None], 5.0) for _ in range(3)]
    teachers[2][1] = torch.randn(40)
    agree(torch.randn(2, 40), teachers, target, weighting="entropy")


def test_ignored_rows_are_zero_whatever_they_contain(rows: tuple) -> None:
    student, teachers, target = rows
    target[1] = target[3] = -100
    student[1], teachers[0][1], teachers[2][3] = NAN, NAN, INF
    agree(student, teachers, target)
    target.fill_(-100)
    agree(student, teachers, target)


def test_labels_out_of_range_give_nan_rows(rows: tuple) -> None:
    student, teachers, target = rows
    target[0], target[2] = WIDE, -1
    agree(student, teachers, target)
    agree(student, teachers, target, hard_weight=0.0, weighting="uniform")


def test_given_weight_of_zero_silences_a_teacher(rows: tuple) -> None:
    """Loss and gradient are those without the teacher, even if its logits are NaN."""
    student, teachers, target = rows
    teachers[1].fill_(NAN)
    weights = torch.tensor([0.5, 0.0, 0.25]).unsqueeze(1).expand(3, 4)
    actual = cuda_backend.row_loss(student, teachers, target, **options(weighting=weights))
    without = cuda_backend.row_loss(student, teachers[::2], target, **options(weighting=weights[::2]))
    assert_near(actual.row_stats[:3], without.row_stats[:3])
    assert_near(actual.grad_student, without.grad_student)


@pytest.mark.parametrize("offset", [1e4, -3e4])
def test_large_offsets_do_not_cancel(rows: tuple, offset: float) -> None:
    """A whole number added to logits on a grid of 1/32 loses none of their bits, so that it changes only roundings.

    An error of 2^-24 in maximum times scale would change the result by 1e-3 here.
    """
    student, teachers, target = rows
    student, *teachers = ((32 * tensor).round() / 32 for tensor in (student, *teachers))
    one = cuda_backend.row_loss(student, teachers, target, **options())
    moved = cuda_backend.row_loss(student + offset, [z + offset for z in teachers], target, **options())
    for ours, expected in zip(moved.row_stats, one.row_stats, strict=True):
        assert_near(ours, expected)
    assert_near(moved.grad_student, one.grad_student)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_student_equal_to_teachers(rows: tuple, offset: float) -> None:
    student, _, target = rows
    student = student + offset
    result = cuda_backend.row_loss(student, [student] * 3, target, **options(hard_weight=0.0))
    assert torch.equal(result.divergence, torch.zeros(3, 4))
    # The terms that cancel are each rounded once.
    assert rms(result.grad_student) <= 4 * torch.finfo(F32).eps * rms(4.0 * (student / 4.0).softmax(1))


def test_repeats_bit_for_bit_with_and_without_gradient_and_writes_no_input(rows: tuple) -> None:
    student, teachers, target = rows
    before = [tensor.clone() for tensor in (student, *teachers, target)]
    first, second = (cuda_backend.row_loss(*rows, **options()) for _ in range(2))
    assert torch.equal(first.row_stats, second.row_stats) and torch.equal(first.grad_student, second.grad_student)
    bare = cuda_backend.row_loss(*rows, **options(needs_grad=False))
    assert bare.grad_student is None and torch.equal(bare.row_stats, first.row_stats)
    assert all(torch.equal(old, new) for old, new in zip(before, (student, *teachers, target), strict=True))


def test_no_rows() -> None:
    empty = torch.empty(0, 7)
    result = cuda_backend.row_loss(empty, [empty, empty], torch.empty(0, dtype=torch.int64), **options())
    assert result.row_stats.shape == (9, 0) and result.grad_student.shape == (0, 7)
    assert cuda_backend.feature_forward([empty], [empty]).shape == (1, 0)
    assert cuda_backend.scale_rows(empty, torch.ones(1), empty) is empty
