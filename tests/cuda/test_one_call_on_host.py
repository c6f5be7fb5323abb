"""The logit loss of the CUDA kernels in one crossing and one launch, executed on the host (test_row_loss_on_host.py).

The crossing reads and makes tensors by torch's C functions; the emulated device has the host's memory. The blocks of a
launch run one after the other here, so that all but the last one give up waiting for the others and count the labels
themselves, or all at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from camkd_fast import CAMKDLoss, camkd_loss
from camkd_fast.losses.formula import Formula
from tests.losses.test_one_call import DECLINED
from tests.support.cases import Case, make_case
from tests.support.evaluate import fields, run, run_value_and_grad
from tests.support.tolerance import assert_result
from tests.support.truth import naive, truth

pytest.importorskip("camkd_fast._C")
pytest.importorskip("pybind11")
from camkd_fast.backends import cuda as cuda_backend
from tests.cuda.host.on_host import cuda_on_the_host, emulated, enter, in_one_call, limit

__all__ = ["cuda_on_the_host", "emulated"]

GRIDS = {"one after the other": (False, False), "together": (True, False), "launches of their own": (False, True)}
WIDE = 1000


@pytest.fixture(autouse=True)
def crossing(emulated: ModuleType, cuda_on_the_host: None) -> Iterator[None]:
    with in_one_call(emulated):
        yield


@pytest.fixture(params=GRIDS)
def grid(request: pytest.FixtureRequest, emulated: ModuleType) -> Iterator[str]:
    emulated.set_grid(*GRIDS[request.param])
    yield str(request.param)
    emulated.set_grid(False, False)


def direct(case: Case, loss_scale: Any = None) -> Any:
    options = case.options()
    formula = Formula(**{name: options[name] for name in Formula._fields}).checked()
    second = None if case.second_target is None else (case.second_target, case.mix)
    return cuda_backend.whole_losses.logit_loss(
        case.student, case.teachers, case.target, formula, case.reduction, case.num_items, loss_scale, second
    )


def check(case: Case, what: str = "") -> None:
    """Both public functions, each in one call."""
    grad_output = torch.linspace(-1, 2, case.target.numel()).view(case.target.shape)
    given = grad_output if case.reduction == "none" else torch.tensor(0.3)
    assert direct(case) is not None
    assert_result(run(case, "cuda", given), case, truth(case, given), naive(case, given), what)
    ones = torch.ones(case.target.shape) if case.reduction == "none" else None
    R, N = truth(case, ones), naive(case, ones)
    assert_result(run_value_and_grad(case, "cuda"), case, R, N, what)


def gradient(found: Any) -> torch.Tensor | None:
    assert found is not None
    return found[2]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("N", "C", "K", "multiprocessors"),
    [
        (3, 40, 2, 2),
        pytest.param(90, 40, 2, 3, marks=pytest.mark.slow),
        (130, 12, 2, 3),
        (5, WIDE, 2, 2),
        (9, 40, 6, 2),
    ],
    ids=str,
)
def test_every_reduction(
    emulated: ModuleType, grid: str, N: int, C: int, K: int, multiprocessors: int, reduction: str
) -> None:
    """A few rows to a cluster, many to a grid, with fewer and with more rows than blocks; and more teachers than any
    kernel is compiled for."""
    limit(emulated, cluster=1, multiprocessors=multiprocessors)
    for ignored, two_labels in ((0.0, False), (0.4, False), (0.4, True)):
        case = make_case(N, C, K, ignored=ignored, reduction=reduction, padded=False, two_labels=two_labels)
        check(case, f"{ignored:g} ignored, two labels: {two_labels}")


@pytest.mark.parametrize("regime", ["cluster", "chunks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_wide_rows(emulated: ModuleType, grid: str, regime: str, dtype: torch.dtype) -> None:
    enter(emulated, regime, 3)
    reduction = "sum" if dtype == torch.float16 else "mean"
    check(make_case(5, WIDE, 3, dtype, lead=(1, 5), ignored=0.2, reduction=reduction), regime)


@pytest.mark.parametrize("scale", [2.0, torch.tensor(2.0), torch.tensor([[2.0]])], ids=["number", "scalar", "element"])
@pytest.mark.parametrize("num_items", [None, 3, 7.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_divisors_and_scales(grid: str, dtype: torch.dtype, num_items: float | None, scale: float | Tensor) -> None:
    case = make_case(6, 40, 2, dtype, ignored=0.4).with_(num_items=num_items)
    assert direct(case, scale) is not None
    factor = torch.tensor(2.0)
    R, N = truth(case, factor), naive(case, factor)
    assert_result(run_value_and_grad(case, "cuda", scale), case, R, N, scale=2.0)


def test_the_numbers_of_a_batch_do_not_depend_on_how_its_blocks_meet(emulated: ModuleType) -> None:
    """Bits included, and call after call: the counters are 0 again. Otherwise a later launch of more blocks might take
    the labels of two launches for its own."""
    limit(emulated, cluster=1, multiprocessors=4)
    case = make_case(300, 40, 3, ignored=0.3, padded=False)
    results = []
    for together in (False, True, True, False):
        emulated.set_grid(together, False)
        results.append(run_value_and_grad(case, "cuda"))
        assert emulated.counters() == (0, 0)
    emulated.set_grid(False, False)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0][:-1], other[:-1], strict=True))


def test_bitwise_the_rows_of_the_general_path() -> None:
    case = make_case(40, 100, 3, torch.bfloat16, ignored=0.2, teacher_dtypes=(torch.float16, torch.float32))
    one = direct(case, loss_scale=8.0)
    rows = cuda_backend.row_loss(
        case.student, case.teachers, case.target, Formula(), needs_grad=True, grad_scale=8.0, mean=True
    )
    assert one is not None
    loss, row_stats, grad_student, _, means, _ = one
    assert torch.equal(row_stats, rows.row_stats) and torch.equal(grad_student, rows.grad_student)
    assert torch.equal(loss, rows.means[0]) and torch.equal(means[1][:3], rows.means[1])


# The device does not tell the host; the rows are NaN.
OWN = ("label too large", "label below 0", "second label too large", "share above 1")


@pytest.mark.parametrize("name", [name for name in DECLINED if name not in OWN])
def test_unsupported_or_invalid_input_is_declined(name: str) -> None:
    student, teachers, target, options = DECLINED[name]
    reduction, items = options.get("reduction", "mean"), options.get("num_items")
    formula = Formula(**{key: value for key, value in options.items() if key in Formula._fields})
    scale = options.get("loss_scale", 1.0)
    arguments = student, teachers, target, formula, reduction, items, scale, options.get("second")
    assert cuda_backend.whole_losses.logit_loss(*arguments) is None


@pytest.mark.parametrize("name", OWN)
def test_labels_out_of_range_give_nan_rows(name: str) -> None:
    student, teachers, target, options = DECLINED[name]
    arguments = student, teachers, target, Formula(), "none", None, 1.0, options.get("second")
    found = cuda_backend.whole_losses.logit_loss(*arguments)
    loss, _, grad, *_ = found
    assert loss.isnan().all() and grad.isnan().all()


def test_the_gradient_is_computed_only_if_needed() -> None:
    case = make_case(4, 40, 2)
    assert gradient(direct(case)) is None and gradient(direct(case, loss_scale=1.0)) is not None
    learning = case.with_(student=case.student.requires_grad_())
    assert gradient(direct(learning)).shape == (4, 40)
    with torch.no_grad():
        assert gradient(direct(learning)) is None


def test_results_have_memory_of_their_own() -> None:
    case = make_case(4, 40, 2)
    for reduction in ("mean", "sum", "none"):
        out = camkd_loss(case.student, case.teachers, case.target, reduction=reduction, backend="cuda")
        before = [part.clone() for part in fields(out)[1:]]
        out.loss.fill_(math.nan)
        out.hard.fill_(math.nan)
        assert all(torch.equal(now, part) for now, part in zip(fields(out)[1:], before, strict=True))


def test_the_module_and_modes(grid: str) -> None:
    """No crossing where operations must be seen: the general path decides."""
    case = make_case(4, 40, 2, padded=False)
    criterion = CAMKDLoss(backend="cuda")
    expected = criterion(case.student, case.teachers, case.target).loss
    with torch.inference_mode():
        assert torch.equal(criterion(case.student, list(case.teachers), case.target).loss, expected)
    wrapped = case.with_(reduction="sum")
    assert_result(run(wrapped, "cuda"), wrapped, truth(wrapped), naive(wrapped))


# --- scaling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [False, True], ids=["one factor", "a factor for each row"])
def test_scaling_in_one_call(emulated: ModuleType, rows: bool, dtype: torch.dtype) -> None:
    grad, factor = torch.randn(9, 33).to(dtype), torch.randn(9 if rows else 1)
    expected = (grad.float() * factor.view(-1, 1)).to(dtype)
    out = torch.empty_like(grad)
    assert emulated.cuda_scale(grad, factor, out) and torch.equal(out, expected)
    assert cuda_backend.scale_rows(grad, factor, grad) is grad and torch.equal(grad, expected)


def test_what_scaling_declines_is_scaled_by_address(emulated: ModuleType) -> None:
    grad, factor = torch.randn(4, 6), torch.randn(1)
    wide = torch.randn(4, 12)
    declined = [
        (wide[:, ::2], factor, torch.empty(4, 6)),
        (grad, factor, wide[:, ::2]),
        (grad, factor.double(), torch.empty(4, 6)),
        (grad, torch.randn(3), torch.empty(4, 6)),
        (grad, factor, torch.empty(4, 5)),
        (grad, factor, torch.empty(4, 6, dtype=torch.bfloat16)),
        (grad.double(), factor, torch.empty(4, 6, dtype=torch.float64)),
        (grad, factor, torch.empty(4, 6, device="meta")),
        (grad[:0], factor, torch.empty(0, 6)),
        (grad, torch.tensor(2.0), torch.empty(4, 6)),
    ]
    assert not any(emulated.cuda_scale(*arguments) for arguments in declined)
    factors = torch.randn(4, 2)[:, 0]
    assert torch.equal(cuda_backend.scale_rows(grad, factors, torch.empty(4, 6)), grad * factors[:, None])
