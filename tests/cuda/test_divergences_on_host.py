"""The CUDA kernel of formulas that are not the paper's, executed on the host (see test_row_loss_on_host.py).

Rows of up to 256 vectors take a warp, wider ones a block of the emulated device's 64 threads. Identities and edges are
those of tests/losses/test_divergences.py.
"""

from __future__ import annotations

import functools
import itertools
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from camkd_fast import camkd_loss
from camkd_fast.backends.contract import PER_TEACHER
from tests.losses import test_divergences as losses
from tests.losses.test_divergences import DIVERGENCES, OTHERS, maps_of
from tests.support.cases import Case, make_case
from tests.support.converged import assert_rows, nearly_certain
from tests.support.evaluate import run, run_value_and_grad
from tests.support.row_contract import assert_agrees, assert_means, options
from tests.support.tolerance import assert_accurate, assert_result
from tests.support.truth import entropy, naive, truth

pytest.importorskip("camkd_fast._C")
pytest.importorskip("pybind11")
from camkd_fast.backends import cuda as cuda_backend
from tests.cuda.host.on_host import cuda_on_the_host, emulated, enter, in_one_call, limit
from tests.cuda.test_one_call_on_host import direct, grid

__all__ = ["cuda_on_the_host", "emulated", "grid"]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAN, INF = float("nan"), float("inf")
DTYPES = (F32, BF16, F16)
# A warp per row and a block per row, each with rows that begin at vector boundaries and with others
WIDTHS = (96, 37, 2304, 2101)
FORMULAS: list[dict[str, Any]] = [
    {"divergence": ("jsd", 0.3), "weighting": "min_ce"},
    {"divergence": "reverse_kl", "z_loss_weight": 0.1, "scale_by_t2": False},
    {"divergence": ("skew", 0.1), "student_softcap": 4.0, "student_logit_scale": 0.5, "entropy": True},
    {"z_loss_weight": 0.1, "weighting": "entropy", "teacher_logit_scales": (1.0, 0.5), "entropy": True},
]


def check(case: Case, what: str = "", grad_output: Tensor | None = None) -> None:
    actual, R, N = run(case, "cuda", grad_output), truth(case, grad_output), naive(case, grad_output)
    assert_result(actual, case, R, N, what)


agree = functools.partial(assert_agrees, cuda_backend.row_loss)

# --- values and gradients --------------------------------------------------------------------------------------------

WEIGHTINGS = ("confidence", "uniform", "entropy", "min_ce", "given")
CELLS = list(itertools.product(DIVERGENCES, (1.0, 2.0, 4.0, 3.3), WEIGHTINGS))


@pytest.mark.parametrize("i", range(len(CELLS)), ids=lambda i: "-".join(str(part) for part in CELLS[i]))
def test_every_divergence_temperature_and_weighting(i: int) -> None:
    """With maps and without; dtypes, widths, layouts, second labels and numbers of teachers rotate."""
    divergence, temperature, weighting = CELLS[i]
    C, K, dtype = WIDTHS[i % 4], 1 + i % 5, DTYPES[i % 3]
    # The entropy of a nearly certain teacher, log(1 + tiny), is mostly rounding error in float32.
    peaked = weighting != "entropy" and i % 3 == 0
    N = 12 if peaked else 4  # few columns of a peaked row have an error
    for maps in (False, True):
        case = make_case(
            N,
            C,
            K,
            dtype,
            peaked=peaked,
            padded=i % 7 > 3,
            ignored=0.2,
            two_labels=(i + maps) % 2 == 0,
            seed=i,
            divergence=divergence,
            temperature=temperature,
            weighting=torch.rand(K, N) if weighting == "given" else weighting,
            z_loss_weight=0.01 * (i % 2 or divergence == "forward_kl"),  # else it would be the paper's formula
            scale_by_t2=i % 11 > 4,
            hard_weight=0.7,
            **(maps_of(K) if maps else {}),
        )
        check(case, f"maps: {maps}")


@pytest.mark.parametrize("C", [200, 2101])
@pytest.mark.parametrize("height", [10.0, 20.0, 24.0])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("divergence", OTHERS, ids=str)
def test_nearly_certain_rows(divergence: Any, temperature: float, height: float, C: int) -> None:
    assert_rows(nearly_certain(height, C, 3, F32, temperature).with_(divergence=divergence), "cuda")


@pytest.mark.parametrize("K", [2, 6])
@pytest.mark.parametrize("weighting", ["confidence", "entropy"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_a_soft_loss_of_weight_0_reads_no_teacher(divergence: Any, weighting: str, K: int) -> None:
    losses.test_a_soft_loss_of_weight_0_reads_no_teacher(divergence, weighting, K, "cuda")


@settings(max_examples=60)
@given(losses.settings_of_a_call())
def test_any_settings_agree_with_the_reference(case: Case) -> None:
    losses.assert_close_to_reference(case, "cuda")


@pytest.mark.parametrize("C", WIDTHS)
@pytest.mark.parametrize("formula", FORMULAS, ids=str)
def test_sixteen_teachers(formula: dict[str, Any], C: int) -> None:
    scales = {"teacher_logit_scales": (1.0, 0.5) * 8} if "teacher_logit_scales" in formula else {}
    check(make_case(3, C, 16, BF16, **{**formula, **scales}))


@pytest.mark.parametrize("dtypes", [(F32, F16, BF16), (F16, F16, F16)], ids=["three", "one"])
@pytest.mark.parametrize("C", [37, 1101])
@pytest.mark.parametrize("divergence", DIVERGENCES[:5], ids=str)
def test_mixed_dtypes(divergence: Any, C: int, dtypes: tuple[torch.dtype, ...]) -> None:
    check(make_case(4, C, 3, BF16, teacher_dtypes=dtypes, divergence=divergence, **maps_of(3)))


@pytest.mark.parametrize("C", WIDTHS)
@pytest.mark.parametrize("formula", FORMULAS, ids=str)
def test_two_row_strides(formula: dict[str, Any], C: int) -> None:
    """(B, S, C) slices that no single row stride describes are read in place, each with its own strides."""
    case = make_case(6, C, 2, lead=(2, 3), padded=False, **formula)
    wide = torch.full((2, 5, C + 8), NAN)
    wide[:, 1:4, 8:] = case.student
    check(case.with_(student=wide[:, 1:4, 8:], teachers=(case.teachers[0], case.teachers[1][:1].expand(2, 3, C))))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("C", [37, 2101])
@pytest.mark.parametrize("formula", FORMULAS, ids=str)
def test_gradient_aligned_unlike_the_logits(formula: dict[str, Any], C: int, dtype: torch.dtype) -> None:
    case = make_case(5, C, 2, dtype, padded=False, ignored=0.2, **formula)
    wide = [torch.full((5, C + 16 - C % 8), NAN, dtype=dtype) for _ in range(3)]
    for buffer, logits in zip(wide, (case.student, *case.teachers), strict=True):
        buffer[:, :C] = logits
    student, *teachers = (buffer[:, :C] for buffer in wide)
    check(case.with_(student=student, teachers=tuple(teachers)))


@pytest.mark.parametrize("C", [33, 1101])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_entropies(divergence: Any, temperature: float, C: int) -> None:
    case = make_case(9, C, 2, ignored=0.2, temperature=temperature, divergence=divergence, entropy=True, **maps_of(2))
    ours = camkd_loss(case.student, case.teachers, case.target, backend="cuda", **case.options()).entropy
    assert ours is not None
    assert_accurate(ours, entropy(case, torch.float64), entropy(case, F32), floor=1e-6)


# --- the minibatch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("N", "C"), [(3, 40), (30, 12), (5, 1101)])
@pytest.mark.parametrize("formula", FORMULAS, ids=str)
def test_in_one_call(emulated: ModuleType, grid: str, formula: dict[str, Any], N: int, C: int, reduction: str) -> None:
    """Fewer and more rows than groups, whose blocks meet at counters, or launches of their own that add up."""
    limit(emulated, multiprocessors=3)
    case = make_case(N, C, 2, ignored=0.3, reduction=reduction, **formula)
    given = torch.linspace(-1, 2, N) if reduction == "none" else None
    with in_one_call(emulated):
        assert direct(case) is not None and direct(case, 1.0)[1].shape[0] == PER_TEACHER + 6 + case.entropy
        check(case, grid, given)
        ones = torch.ones(N) if reduction == "none" else None
        assert_result(run_value_and_grad(case, "cuda"), case, truth(case, ones), naive(case, ones), grid)


@pytest.mark.parametrize("scale", [8.0, torch.tensor([8.0])], ids=["number", "tensor"])
@pytest.mark.parametrize(("N", "C"), [(0, 40), (4, 40), (30, 40), (4, 1101)])
@pytest.mark.parametrize("formula", FORMULAS, ids=str)
def test_means(formula: dict[str, Any], N: int, C: int, scale: float | Tensor) -> None:
    student, *teachers = torch.randn(3, N, C).unbind()
    assert_means(cuda_backend.row_loss, student, teachers, torch.randint(C, (N,)), scale, **formula)


def test_the_numbers_of_a_batch_do_not_depend_on_how_its_blocks_meet(emulated: ModuleType) -> None:
    limit(emulated, multiprocessors=4)
    case = make_case(200, 40, 2, ignored=0.3, padded=False, divergence=("jsd", 0.5))
    results = []
    with in_one_call(emulated):
        for together in (False, True, False):
            emulated.set_grid(together, False)
            results.append(run_value_and_grad(case, "cuda"))
    emulated.set_grid(False, False)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0][:-1], other[:-1], strict=True))


# --- a gradient in the student's memory ------------------------------------------------------------------------------


def assert_in_place(case: Case, changes: dict[str, Any]) -> None:
    teachers = list(case.teachers)
    expected = cuda_backend.row_loss(case.student, teachers, case.target, **options(**changes))
    student = case.student.clone()
    ours = cuda_backend.row_loss(student, teachers, case.target, out=student, **options(**changes))
    assert ours.grad_student is student
    assert torch.equal(student, expected.grad_student) and torch.equal(ours.row_stats, expected.row_stats)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", [1, *WIDTHS])
@pytest.mark.parametrize("formula", FORMULAS, ids=str)
def test_a_gradient_in_the_students_memory(formula: dict[str, Any], C: int, dtype: torch.dtype) -> None:
    """More rows than groups; labels at every place of a vector."""
    case = make_case(11, C, 2, dtype, padded=False, ignored=0.2)
    assert_in_place(case, formula)


@pytest.mark.parametrize("regime", ["table", "cluster", "cooperative", "chunks"])
@pytest.mark.parametrize("temperature", [4.0, 3.3])
@pytest.mark.parametrize("C", [1000, 1001])
def test_the_papers_gradient_in_the_students_memory(
    emulated: ModuleType, regime: str, temperature: float, C: int
) -> None:
    """Row 2 has labels far below the maximum, so that the kernel reads it twice before it writes."""
    enter(emulated, regime, 2)
    case = make_case(7, C, 2, padded=False, ignored=0.2)
    for z in (case.student, *case.teachers):
        z[2, case.target[2].clamp(min=0)] = -300.0
    assert_in_place(case, {"temperature": temperature})


# --- identities and edges --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_a_student_equal_to_its_teachers_has_no_divergence(divergence: Any) -> None:
    losses.test_a_student_equal_to_its_teachers_has_no_divergence(divergence, "cuda")


@pytest.mark.parametrize(
    "name",
    [
        "the_ends_of_a_range_are_kls",
        "jsd_of_one_half_is_symmetric",
        "min_ce_takes_the_first_of_the_lowest",
        "a_map_is_the_loss_of_mapped_logits",
    ],
)
def test_identities(name: str) -> None:
    getattr(losses, f"test_{name}")("cuda")


@pytest.mark.parametrize(("C", "temperature"), [(33, 1.0), (33, 3.0), (5000, 1.0), (5000, 3.0)])
@pytest.mark.parametrize("divergence", OTHERS, ids=str)
def test_columns_without_probability(divergence: Any, C: int, temperature: float) -> None:
    losses.test_columns_without_probability(divergence, C, temperature, "cuda")


def test_softcaps_far_above_the_logits() -> None:
    losses.test_softcaps_far_above_the_logits("cuda")


@pytest.mark.parametrize("divergence", OTHERS, ids=str)
def test_terms_of_weight_0_contribute_nothing(divergence: Any) -> None:
    losses.test_terms_of_weight_0_contribute_nothing(divergence, "cuda")


@pytest.mark.parametrize("C", [33, 1101])
@pytest.mark.parametrize("formula", FORMULAS, ids=str)
def test_ignored_rows_are_zero_whatever_they_contain(formula: dict[str, Any], C: int) -> None:
    case = make_case(20, C, 2, padded=False, ignored=0.3, **formula)
    excluded = case.target == -100
    spoiled = [z.masked_fill(excluded.unsqueeze(1), NAN) for z in (case.student, *case.teachers)]
    changed = case.with_(student=spoiled[0], teachers=tuple(spoiled[1:]))
    for ours, expected in zip(run(changed, "cuda")[:7], run(case, "cuda")[:7], strict=True):
        assert torch.equal(ours, expected)
    rows = cuda_backend.row_loss(spoiled[0], spoiled[1:], case.target, **options(**formula))
    assert not rows.row_stats[:, excluded].any() and not rows.grad_student[excluded].any()


@pytest.mark.parametrize("C", [40, 1101])
@pytest.mark.parametrize("formula", FORMULAS, ids=str)
def test_labels_out_of_range_give_nan_rows(formula: dict[str, Any], C: int) -> None:
    student, *teachers = torch.randn(3, 5, C).unbind()
    target = torch.tensor([C, 3, -1, -100, C - 1])
    agree(student, teachers, target, **formula)
    agree(student, teachers, target, **{**formula, "hard_weight": 0.0})


@pytest.mark.parametrize("C", [96, 37, 1104, 1101])
@pytest.mark.parametrize("lowest", [(0, 1, 2), (0,), (1,)], ids=["all", "student", "one teacher"])
@pytest.mark.parametrize("formula", [FORMULAS[0], FORMULAS[3], FORMULAS[1]], ids=str)
def test_columns_masked_with_infinity_and_with_the_lowest_number(
    formula: dict[str, Any], lowest: tuple[int, ...], C: int
) -> None:
    """The first columns are masked: there the running maximum is the mask itself, whose sums must vanish later."""
    if formula is FORMULAS[1] and lowest == (0,):
        lowest = (1, 2)  # the gradient of the reverse KL is NaN where a student has the lowest number, a teacher -inf
    tensors = [torch.randn(4, C) for _ in range(3)]
    for i, tensor in enumerate(tensors):
        tensor[:, : C // 2] = torch.finfo(F32).min if i in lowest else -INF
    target = torch.tensor([C // 2, C - 1, C // 2 + 1, C - 2])
    agree(tensors[0], tensors[1:], target, **formula)


@pytest.mark.parametrize("divergence", ["forward_kl", ("jsd", 0.3)], ids=str)
@pytest.mark.parametrize("C", WIDTHS)
def test_min_ce_of_a_nan_is_nan(divergence: Any, C: int) -> None:
    student, teachers = torch.randn(4, C), [3 * torch.randn(4, C) for _ in range(3)]
    teachers[1][1, 3], teachers[0][2, 5] = NAN, NAN
    agree(student, teachers, torch.tensor([3, C - 1, 0, 7]), weighting="min_ce", divergence=divergence)


@pytest.mark.parametrize("divergence", [("jsd", 0.999), ("skew", 0.99), ("jsd", 1e-3)], ids=str)
@pytest.mark.parametrize("C", WIDTHS)
def test_shares_near_the_ends_of_their_range(divergence: Any, C: int) -> None:
    check(make_case(24, C, 2, divergence=divergence, temperature=2.0))


@pytest.mark.parametrize("layout", ["per teacher", "transposed", "every other row"])
def test_given_weights_of_any_strides(layout: str) -> None:
    weights = {
        "per teacher": torch.rand(3, 1).expand(3, 12),
        "transposed": torch.rand(12, 3).t(),
        "every other row": torch.rand(3, 24)[:, ::2],
    }[layout]
    case = make_case(12, 72, 3, padded=False)
    agree(case.student, list(case.teachers), case.target, weighting=weights, divergence=("skew", 0.3))


@pytest.mark.parametrize("formula", FORMULAS, ids=str)
def test_repeats_bit_for_bit_with_and_without_gradient_and_writes_no_input(formula: dict[str, Any]) -> None:
    student, *teachers = torch.randn(3, 5, 1101).unbind()
    tensors = student, teachers, torch.tensor([3, 1100, 0, 40, -100])
    before = [tensor.clone() for tensor in (student, *teachers)]
    first, second = (cuda_backend.row_loss(*tensors, **options(**formula)) for _ in range(2))
    assert torch.equal(first.row_stats, second.row_stats) and torch.equal(first.grad_student, second.grad_student)
    bare = cuda_backend.row_loss(*tensors, **options(needs_grad=False, **formula))
    assert bare.grad_student is None and torch.equal(bare.row_stats, first.row_stats)
    assert all(torch.equal(old, new) for old, new in zip(before, (student, *teachers), strict=True))
