"""`python -m benchmarks.row_kernel --geometries` on the emulated CUDA device: the geometries it finds and times."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

pytest.importorskip("camkd_fast._C")
pytest.importorskip("pybind11")
from benchmarks import row_kernel
from benchmarks.row_kernel import Geometry
from camkd_fast import camkd_loss_and_grad
from tests.cuda.host.on_host import cuda_on_the_host, emulated, limit
from tests.support.cases import Case, make_case
from tests.support.evaluate import run_value_and_grad
from tests.support.tolerance import assert_result
from tests.support.truth import naive, truth

__all__ = ["cuda_on_the_host", "emulated"]

# Rows of 4096 columns are 16 vectors for each lane of a warp, shared out among blocks of three or four warps at most:
# warps, slots and blocks, each with two to four rows in flight and with one and two gradients at once.
WIDE = [(2, 4, 2), (3, 2, 3), (3, 3, 2), (4, 1, 4), (4, 2, 2), (4, 4, 1)]
ORDERS = list(itertools.product((2, 3, 4), (1, 2)))


@pytest.fixture(autouse=True)
def on_the_host(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_kernel, "_C", emulated)
    monkeypatch.setattr(row_kernel, "WARPS", range(1, 6))
    monkeypatch.setattr(row_kernel, "SLOTS", range(1, 6))


def call_of(case: Case) -> Callable[[], object]:
    return lambda: camkd_loss_and_grad(case.student, case.teachers, case.target, backend="cuda")


def assert_right(case: Case) -> None:
    assert_result(run_value_and_grad(case, "cuda"), case, truth(case), naive(case))


def wide_case(N: int, C: int) -> Case:
    """Every other row is summed up twice, as its label is far from the maximum."""
    case = make_case(N, C, 3, torch.bfloat16, padded=False, ignored=0.2)
    for z in (case.student, *case.teachers):
        z[::2, 5] = 300.0
    return case


def test_every_geometry_of_wide_rows_gives_the_right_result(emulated: ModuleType) -> None:
    limit(emulated, cluster=1, multiprocessors=4, least_cooperative=2, pipeline_warps=4)
    case = wide_case(17, 4096)
    found = row_kernel.geometries(call_of(case))
    assert found == [Geometry(False, True, *sizes, *order) for sizes in WIDE for order in ORDERS]
    for geometry in found:
        with row_kernel.trial_of(geometry):
            assert_right(case)
            assert Geometry(*emulated.cuda_tried_geometry()) == geometry


@pytest.mark.parametrize(("rows", "gradients"), ORDERS)
@pytest.mark.parametrize("N", [1, 36, 37])
def test_every_order_of_uneven_rows_gives_the_right_result(
    emulated: ModuleType, N: int, rows: int, gradients: int
) -> None:
    """One group of three blocks takes all of them; one row has no pipeline."""
    limit(emulated, cluster=1, multiprocessors=4, least_cooperative=2, pipeline_warps=4)
    case = wide_case(N, 4091)
    with row_kernel.trial(rows=rows, gradients=gradients):
        assert_right(case)
        used = Geometry(*emulated.cuda_tried_geometry())
    assert (used.pipelined, used.rows, used.gradients) == ((True, rows, gradients) if N > 1 else (False, 1, 0))


@pytest.mark.parametrize(("rows", "gradients"), [(1, 0), (5, 0), (-1, 0), (0, 3), (0, -1)])
def test_orders_that_the_kernel_does_not_have_are_refused(emulated: ModuleType, rows: int, gradients: int) -> None:
    with pytest.raises(
        ValueError, match=f"{rows} rows in flight, {gradients} gradients at once; possible are 2 to 4, 1 to 2"
    ):
        emulated.cuda_try_geometry(0, 0, rows, gradients)


def test_every_geometry_of_narrow_rows_gives_the_right_result(emulated: ModuleType) -> None:
    """A block has one warp or two on this device, and a row always as many slots as it needs."""
    limit(emulated, multiprocessors=1)
    case = make_case(37, 1000, 3, torch.bfloat16, padded=False, ignored=0.2)
    found = row_kernel.geometries(call_of(case))
    assert found == [Geometry(True, False, warps, 4, 1, 1, 0) for warps in (1, 2)]
    for geometry in found:
        with row_kernel.trial_of(geometry):
            assert_right(case)


def test_any_number_of_warps(emulated: ModuleType) -> None:
    """Blocks whose half is no whole number of warps, as seven warps on a GPU."""
    emulated.set_limits(1, 160 * 1024, 3 * (160 * 1024 + 1024), 1 << 20, 8, 256, 0, 0)
    case = make_case(37, 100, 3, torch.bfloat16, padded=False, ignored=0.2)
    for warps in (3, 5, 7, 8):
        with row_kernel.trial(warps):
            assert_right(case)
            assert emulated.cuda_tried_geometry()[:3] == (True, False, warps)


def test_a_trial_ends_with_its_block(emulated: ModuleType) -> None:
    limit(emulated, multiprocessors=1)
    call = call_of(make_case(37, 1000, 3, torch.bfloat16, padded=False))
    with pytest.raises(KeyError), row_kernel.trial(1):
        raise KeyError
    call()
    emulated.cuda_try_geometry(2, 0, 0, 0)
    call()
    before = emulated.cuda_tried_geometry()
    emulated.cuda_try_geometry(0, 0, 0, 0)
    call()
    assert emulated.cuda_tried_geometry() == before == (True, False, 2, 4, 1, 1, 0)


def test_rounds_time_every_geometry(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The median of the rounds, each of which times all in the same order."""
    limit(emulated, cluster=1, multiprocessors=4, least_cooperative=2, pipeline_warps=4)
    calls: list[Geometry | None] = []

    def seconds(call: Callable[[], object], count: int) -> float:
        call()
        calls.append(Geometry(*emulated.cuda_tried_geometry()))
        return float(len(calls))

    monkeypatch.setattr(row_kernel, "seconds", seconds)
    wanted = [Geometry(False, True, *sizes, 2, gradients) for sizes, gradients in zip(WIDE[:2], (1, 2), strict=True)]
    case = make_case(16, 4096, 3, torch.bfloat16, padded=False)
    assert row_kernel.medians(call_of(case), 1, wanted) == [7.0, 8.0]
    assert calls == wanted * row_kernel.ROUNDS
