"""Means over a minibatch where a warp or a group of blocks has many rows, executed on the host.

Rows of every kind are among them: ignored ones, and rows that need the general passes. None is NaN, which would hide
the others.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from tests.support.cases import make_case
from tests.support.row_contract import assert_means

pytest.importorskip("camkd_fast._C")
pytest.importorskip("pybind11")
from camkd_fast.backends import cuda as cuda_backend
from tests.cuda.host.on_host import cuda_on_the_host, emulated, enter, limit
from tests.cuda.test_warp_rows_on_host import rows_of_all_kinds

__all__ = ["cuda_on_the_host", "emulated"]

F32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("C", [40, 2000])
def test_narrow_rows(emulated: ModuleType, C: int, dtype: torch.dtype) -> None:
    """Two at a time or one; C = 41: of the kernel of any rows."""
    for width in (C, C + 1):
        limit(emulated, multiprocessors=2, cluster=1)  # a single block would add up row_stats
        student, teachers, target = rows_of_all_kinds(width, 3, dtype)
        target = target.where((target >= -100) & (target != -1) & (target < width), 0)
        student = student.masked_fill(student.isneginf(), -50.0)  # at a label it would be an infinite loss
        assert_means(cuda_backend.row_loss, student, teachers, target, 0.7)


def test_launches_of_their_own(emulated: ModuleType) -> None:
    """Where there are no counters, one block counts the labels before the rows and adds up after them."""
    limit(emulated, multiprocessors=2, cluster=1)
    emulated.set_grid(False, True)
    try:
        student, *teachers = torch.randn(4, 300, 40, generator=torch.Generator().manual_seed(0)).unbind()
        assert_means(cuda_backend.row_loss, student, teachers, torch.arange(300) % 40, 0.7)
    finally:
        emulated.set_grid(False, False)


@pytest.mark.parametrize("N", [4, 37, 71])
def test_long_pipelines(emulated: ModuleType, N: int) -> None:
    enter(emulated, "pipelined", 3)
    case = make_case(N, 1001, 3, BF16, padded=False, ignored=0.3)
    for z in (case.student, *case.teachers):
        z[::3, 5] = 300.0
        z[1::5, 7] = 200.0
    assert_means(cuda_backend.row_loss, case.student, list(case.teachers), case.target, 0.7)
    assert emulated.last_rows() == (False, 1, 2, True, True)
