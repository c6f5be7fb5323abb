"""Every backend on the GPU against the float64 truth, over a grid of widths, numbers of teachers and dtypes.

The whole grid is 10 widths x 4 numbers of teachers x 3 dtypes x 2 layouts, which Triton compiles in 2 to 4 seconds
each; it is marked `slow`. The default run has one cell per width and dtype, and rotates the number of teachers, layout,
weighting and temperature, so that it covers all pairs of width and dtype and of number and dtype. All row counts of a
cell share its compiled kernels: up to 4096 rows for C <= 1128 and 289 for C <= 151936, because the float64 truth of
more takes minutes and tens of GB.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import pytest
import torch

from camkd_fast import camkd_loss, camkd_loss_and_grad, confidence_weights, weighted_feature_loss
from tests.support.cases import Case, make_case, on
from tests.support.evaluate import run, run_value_and_grad
from tests.support.gpu import Place
from tests.support.tolerance import assert_accurate, assert_result, rms
from tests.support.truth import naive, truth

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CLASSES = (10, 100, 1000, 1128, 21841, 32000, 65537, 128256, 151936, 262144)
TEACHERS = (1, 2, 3, 5)
DTYPES = (F32, BF16, F16)
WEIGHTINGS = ("confidence", "entropy", "uniform", "given")
TEMPERATURES = (4.0, 1.0, 20.0)


class Cell(NamedTuple):
    C: int
    K: int
    dtype: torch.dtype
    padded: bool
    weighting: str = "confidence"
    temperature: float = 4.0

    def __str__(self) -> str:
        layout = "padded" if self.padded else "aligned"
        return f"C{self.C}-K{self.K}-{str(self.dtype).removeprefix('torch.')}-{layout}-{self.weighting}"

    def rows(self, real: bool) -> list[int]:
        """Numbers of rows; the two smallest are enough for a rehearsal."""
        count = 4 if self.C <= 1128 else 3 if self.C <= 151936 else 2
        return [1, 7, 289, 4096][: count if real else 2]

    def case(self, N: int) -> Case:
        options = {"temperature": self.temperature, "weighting": self.weighting}
        if self.weighting == "given":
            options["weighting"] = torch.rand(self.K, N, generator=torch.Generator().manual_seed(N))
        peaked = (self.C + N) % 2 == 1  # half of all, over rows and widths
        return make_case(N, self.C, self.K, self.dtype, padded=self.padded, peaked=peaked, ignored=0.2, **options)


ONE_PER_PAIR = [
    Cell(C, TEACHERS[(i + j) % 4], dtype, (i + j) % 2 == 0, WEIGHTINGS[(i + 2 * j) % 4], TEMPERATURES[(i + j) % 3])
    for (i, C), (j, dtype) in product(enumerate(CLASSES), enumerate(DTYPES))
]
ALL = [Cell(*cell) for cell in product(CLASSES, TEACHERS, DTYPES, (False, True))]


def check(place: Place, cell: Cell) -> None:
    for N in cell.rows(place.real):
        case = on(cell.case(N), place.device)
        assert_result(run(case, place.backend), case, truth(case), naive(case), f"N={N}")


@pytest.mark.parametrize("cell", ONE_PER_PAIR, ids=str)
def test_matches_truth(place: Place, cell: Cell) -> None:
    check(place, cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ALL, ids=str)
def test_matches_truth_everywhere(gpu: Place, cell: Cell) -> None:
    check(gpu, cell)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", [100, 33000])
def test_value_and_grad_with_a_loss_scale_on_the_device(place: Place, C: int, dtype: torch.dtype) -> None:
    case = on(make_case(9, C, 3, dtype, peaked=True, ignored=0.2), place.device)
    scale = torch.tensor([64.0], device=place.device)
    R, N = truth(case, scale[0]), naive(case, scale[0])
    assert_result(run_value_and_grad(case, place.backend, scale), case, R, N, scale=64.0)


@pytest.mark.parametrize("C", [100, 33000])
@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_reductions(place: Place, reduction: str, ignored: float, C: int) -> None:
    case = on(make_case(16, C, 2, ignored=ignored, reduction=reduction), place.device)
    size = 16 if reduction == "none" else ()
    factor = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(place.device)
    R, N = truth(case, factor), naive(case, factor)
    assert_result(run(case, place.backend, factor), case, R, N, scale=3.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighting", ["confidence", "entropy"])
@pytest.mark.parametrize("C", [100, 1001, 33000])
def test_two_labels(place: Place, C: int, weighting: str, dtype: torch.dtype) -> None:
    for K in (1, 3, 6):
        # The entropy of a nearly certain teacher is mostly rounding error in float32
        peaked = K == 3 and weighting != "entropy"
        case = make_case(16, C, K, dtype, peaked=peaked, ignored=0.2, weighting=weighting, two_labels=True)
        case = on(case, place.device)
        R, N = truth(case), naive(case)
        assert_result(run(case, place.backend), case, R, N, f"K={K}")
        assert_result(run_value_and_grad(case, place.backend), case, R, N, f"K={K}")


@pytest.mark.parametrize("C", [100, 33000])
def test_rows_of_one_label_among_two(place: Place, C: int) -> None:
    case = on(make_case(16, C, 3, peaked=True, ignored=0.2), place.device)
    expected = run(case, place.backend)
    ones = torch.ones(16, device=place.device)
    same = case.with_(second_target=case.target, mix=ones / 4)
    for other in (same, case.with_(second_target=(case.target + 1) % C, mix=ones)):
        assert all(torch.equal(a, b) for a, b in zip(run(other, place.backend)[:7], expected[:7], strict=True))


@pytest.mark.parametrize("C", [70, 33000])
def test_masked_columns_and_infinite_cross_entropies(place: Place, C: int) -> None:
    case = make_case(4, C, 3, padded=False)
    for z in (case.student, *case.teachers):
        z[:, 4 : C // 2] = float("-inf")
    case = case.with_(target=torch.tensor([3, C - 1, 0, C - 2]))
    case.teachers[0][1, C - 1] = float("-inf")  # its cross-entropy is infinite, its weight 0
    case = on(case, place.device)
    actual = run(case, place.backend)
    exact = case.with_(student=case.student.double(), teachers=tuple(z.double() for z in case.teachers))
    # Not `truth`, which makes -inf finite and with it the cross-entropy.
    assert_result(actual, case, run(exact, "reference"), run(case, "reference"))
    assert actual.weights[0, 1] == 0


@pytest.mark.parametrize("C", [70, 33000])
def test_ignored_rows_may_contain_nan(place: Place, C: int) -> None:
    case = make_case(4, C, 2, padded=False).with_(target=torch.tensor([1, -100, 2, -100]))
    case.student[1] = case.teachers[0][3] = float("nan")
    actual = run(on(case, place.device), place.backend)
    assert actual.loss.isfinite() and actual.grad.isfinite().all()
    assert not actual.grad[1].any() and not actual.grad[3].any()


def transposed(z: torch.Tensor) -> torch.Tensor:
    return z.t().contiguous().t()


def every_other_row(z: torch.Tensor) -> torch.Tensor:
    return torch.full((2 * len(z), z.shape[1]), float("nan"), dtype=z.dtype, device=z.device)[::2].copy_(z)


LAYOUTS = {
    "transposed": transposed,
    "every other row": every_other_row,
    "equal rows": lambda z: z[:1].contiguous().expand_as(z),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("C", [67, 33000])
def test_layouts(place: Place, C: int, layout: str) -> None:
    dense = on(make_case(9, C, 2, BF16, padded=False), place.device)
    laid_out = dense.with_(
        student=LAYOUTS[layout](dense.student), teachers=tuple(LAYOUTS[layout](z) for z in dense.teachers)
    )
    assert_result(run(laid_out, place.backend), laid_out, truth(laid_out), naive(laid_out))


def test_tokens_and_a_shifted_view(place: Place) -> None:
    case = on(make_case(24, 100, 2, BF16, lead=(4, 6), padded=False), place.device)
    shifted = case.with_(
        student=case.student[:, :-1], teachers=tuple(z[:, :-1] for z in case.teachers), target=case.target[:, 1:]
    )
    assert_result(run(shifted, place.backend), shifted, truth(shifted), naive(shifted))


@pytest.mark.parametrize("C", [100, 32000])
def test_repeats_bit_for_bit_and_writes_no_input(place: Place, C: int) -> None:
    case = on(make_case(33, C, 3, BF16, peaked=True), place.device)
    before = [z.clone() for z in (case.student, *case.teachers, case.target)]
    first = run(case, place.backend)
    for _ in range(3):
        again = run(case, place.backend)
        assert all(torch.equal(a, b) for a, b in zip(first[:7], again[:7], strict=True))
    after = (case.student, *case.teachers, case.target)
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("one_label", [True, False])
@pytest.mark.parametrize("C", [100, 3000])
def test_confidence_weights_and_feature_loss(place: Place, C: int, one_label: bool) -> None:
    generator = torch.Generator().manual_seed(C)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(place.device)

    logits = [3 * random(16, C) for _ in range(3)]
    student, teachers = ([random(16, 6 + k, 5, 5) for k in range(3)] for _ in range(2))
    target = torch.randint(C, (16,), generator=generator).to(place.device)

    second = None if one_label else torch.randint(C, (16,), generator=generator).to(place.device)
    mix = None if one_label else torch.rand(16, generator=generator).to(place.device)

    def results(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [z.to(dtype).requires_grad_() for z in (*logits, *student)]
        weights, ce = confidence_weights(leaves[:3], target, backend=backend, second_target=second, mix=mix)
        loss = weighted_feature_loss(leaves[3:], [f.to(dtype) for f in teachers], weights, backend=backend)
        (loss + ce.mean()).backward()
        return [loss.detach(), weights.detach(), ce.detach(), *(leaf.grad for leaf in leaves)]

    R, N = results("reference", torch.float64), results("reference", F32)
    # The softmax is rebuilt from a stored float32 log-sum-exp, whose rounding is relative to its own size.
    lse = max(float(z.detach().logsumexp(1).max()) for z in logits)
    for ours, true, eager in zip(results(place.backend, F32), R, N, strict=True):
        assert_accurate(ours, true, eager, floor=torch.finfo(F32).eps * lse * rms(true))


# --- only on a GPU ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("C", [100, 33000])
def test_labels_out_of_range_give_nan_rows(gpu: Place, C: int) -> None:
    case = on(make_case(4, C, 2, padded=False, reduction="none"), gpu.device)
    bad = case.with_(target=torch.tensor([0, C, 1, -1], device=gpu.device))
    actual = run(bad, gpu.backend, torch.ones(4, device=gpu.device))
    assert actual.loss.isnan().tolist() == [False, True, False, True]
    assert actual.grad[[0, 2]].isfinite().all()
    mix = torch.tensor([0.5, 1.5, 0.5, float("nan")], device=gpu.device)
    for second, share in ((bad.target, mix[[0, 0, 2, 2]]), (case.target, mix)):
        actual = run(case.with_(second_target=second, mix=share), gpu.backend, torch.ones(4, device=gpu.device))
        assert actual.loss.isnan().tolist() == [False, True, False, True]
        assert actual.grad[[0, 2]].isfinite().all() and actual.grad[[1, 3]].isnan().all()


@pytest.mark.parametrize(("rows", "C"), [(2**31 // 32000 + 9, 32000), (2**31 // 1000 + 9, 1000)])
def test_more_than_2_to_the_31_elements(gpu: Place, rows: int, C: int) -> None:
    # The student takes 4.3 GB and the gradient as much; teachers are one row each.
    if gpu.backend == "reference":
        pytest.skip("the reference would hold a dozen float32 copies of 8.6 GB each")
    torch.cuda.empty_cache()  # release the cached memory of earlier tests
    free, _ = torch.cuda.mem_get_info(gpu.device)
    if free < 12e9:
        pytest.skip(f"needs 12 GB, {free / 1e9:.0f} GB are free")
    generator = torch.Generator().manual_seed(4)
    block = torch.randn(64, C, generator=generator).bfloat16().to(gpu.device)
    student = block.repeat(rows // 64 + 1, 1)[:rows]
    assert student.numel() > 2**31
    teachers = [torch.randn(1, C, generator=generator).bfloat16().to(gpu.device) for _ in range(3)]
    labels = torch.randint(C, (64,), generator=generator).to(gpu.device)
    target = labels.repeat(rows // 64 + 1)[:rows]
    expanded = [z.expand(rows, C) for z in teachers]
    out, grad = camkd_loss_and_grad(student, expanded, target, reduction="sum", backend=gpu.backend)
    small = Case(block, tuple(z.expand(64, C) for z in teachers), labels, reduction="sum")
    R = truth(small)
    # All blocks of rows are equal: the last must equal the first bit for bit, and the first must be accurate.
    for first in (0, (rows // 128) * 64, (rows // 64 - 1) * 64):
        assert torch.equal(grad[first : first + 64], grad[:64])
    last = (rows - 1) % 64
    assert torch.equal(grad[-1], grad[last]) and torch.equal(out.weights[:, -1], out.weights[:, last])
    assert rms(grad[:64].double() - R.grad) <= 0.004 * rms(R.grad)


def test_more_rows_than_16_bits(place: Place) -> None:
    case = on(make_case(2**16 + 5, 3, 2), place.device)
    assert_result(run(case, place.backend), case, truth(case), naive(case))


def test_no_rows(place: Place) -> None:
    student = torch.empty(0, 7, device=place.device, requires_grad=True)
    target = torch.empty(0, dtype=torch.int64, device=place.device)
    out = camkd_loss(student, [student.detach()] * 2, target, backend=place.backend)
    out.loss.backward()
    assert out.loss == 0 and student.grad.shape == (0, 7)
