"""The kernel of narrow rows that are all alike (csrc/cuda/row_loss/warp_rows.cuh), on the host: rows that it cannot
take give the same bits in the kernel of any rows, kernel.cuh.

test_row_loss_on_host.py and test_row_loss_accuracy.py compare both with the float64 truth.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.row_contract import options

pytest.importorskip("camkd_fast._C")
pytest.importorskip("pybind11")
from camkd_fast.backends import cuda as cuda_backend
from tests.cuda.host.on_host import cuda_on_the_host, emulated, limit

__all__ = ["cuda_on_the_host", "emulated"]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
INF = float("inf")
ROWS = 29  # two at a time on one multiprocessor: the last pair is incomplete, and warps have several pairs


def rows_of_all_kinds(C: int, K: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], Tensor]:
    """Student, teachers and labels: ignored, invalid, far below the maximum, and of masked columns."""
    generator = torch.Generator().manual_seed(C + K)
    student, *teachers = (3 * torch.randn(ROWS, C, generator=generator) for _ in range(K + 1))
    target = torch.randint(C, (ROWS,), generator=generator)
    for z in (student, *teachers):
        z[1::2, (int(target[5]) + 1) % C] = -INF
        z[7, target[7]] = z[20, target[20]] = -300.0  # out of the range of the fast path
        z[12] += 1000.0
    teachers[0][25, target[25]] = -INF
    target[[2, 3, 15, 28]] = -100
    target[[9, 10]] = torch.tensor([C, -1])
    return student.to(dtype), [z.to(dtype) for z in teachers], target


def elsewhere(z: Tensor, stride: int, offset: int) -> Tensor:
    """The same numbers in rows at a distance, from an element of a buffer on."""
    memory = torch.full((offset + z.shape[0] * stride,), float("nan"), dtype=z.dtype)
    copy = memory[offset:].unflatten(0, (z.shape[0], stride))[:, : z.shape[1]]
    copy.copy_(z)
    return copy


def bits(result: Any) -> list[Tensor]:
    """Every number of a result, with one NaN for all."""
    found = [result.row_stats, *(result.means or ()), *([] if result.grad_student is None else [result.grad_student])]
    return [x.float().nan_to_num(nan=12345.0) for x in found]


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("K", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    ("C", "dtype", "pair"), [(40, BF16, True), (72, F16, True), (40, F32, True), (2000, BF16, False)]
)
def test_bits_of_the_kernel_of_any_rows(
    emulated: ModuleType, C: int, dtype: torch.dtype, pair: bool, K: int, temperature: float, mean: bool
) -> None:
    """A teacher that is aligned unlike the others has its vectors read by elements, in the same order."""
    limit(emulated, multiprocessors=1, cluster=1)
    student, teachers, target = rows_of_all_kinds(C, K, dtype)
    vector = 16 // dtype.itemsize
    assert emulated.row_geometry(ROWS, C, K, vector)[:2] == (True, 2 if pair else 1)
    arguments = options(temperature=temperature, hard_weight=0.7, grad_scale=0.3, mean=mean)
    even = cuda_backend.row_loss(student, teachers, target, **arguments)
    shifted = cuda_backend.row_loss(student, [*teachers[:-1], elsewhere(teachers[-1], C, 1)], target, **arguments)
    for ours, expected in zip(bits(even), bits(shifted), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("weighting", ["uniform", "given"])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_rows_at_a_distance_and_other_weights(emulated: ModuleType, weighting: str, needs_grad: bool) -> None:
    """Each stream has a distance of its own between its rows; without a gradient the rows are the same."""
    limit(emulated, multiprocessors=1)
    student, teachers, target = rows_of_all_kinds(64, 3, BF16)
    weights = torch.rand(3, ROWS).masked_fill(torch.rand(3, ROWS) < 0.2, 0.0) if weighting == "given" else weighting
    arguments = options(weighting=weights, needs_grad=needs_grad, mean=True)
    even = [elsewhere(z, 64 + 8 * k, 8 * k) for k, z in enumerate((student, *teachers))]
    shifted = [elsewhere(z, 64 + 8 * k, k) for k, z in enumerate((student, *teachers))]
    found, expected = (cuda_backend.row_loss(z[0], z[1:], target, **arguments) for z in (even, shifted))
    for ours, theirs in zip(bits(found), bits(expected), strict=True):
        assert torch.equal(ours, theirs)


def test_rows_of_two_dimensions(emulated: ModuleType) -> None:
    """Rows that do not all lie at the same distance take the other kernel."""
    student, teachers, target = rows_of_all_kinds(64, 3, BF16)
    student, *teachers = (z[:28] for z in (student, *teachers))
    expected = cuda_backend.row_loss(student, teachers, target[:28], **options())
    spread = elsewhere(student.reshape(4, 7 * 64), 9 * 64, 0).unflatten(1, (7, 64))
    found = cuda_backend.row_loss(spread, [z.view(4, 7, 64) for z in teachers], target[:28], **options())
    for ours, theirs in zip(bits(found), bits(expected), strict=True):
        assert torch.equal(ours, theirs)


def test_a_gradient_aligned_unlike_the_logits() -> None:
    student, teachers, target = rows_of_all_kinds(64, 3, BF16)
    expected = cuda_backend.row_loss(student, teachers, target, **options())
    out = elsewhere(torch.zeros_like(student), 64, 1)
    found = cuda_backend.row_loss(student, teachers, target, **options(), out=out)
    for ours, theirs in zip(bits(found), bits(expected), strict=True):
        assert torch.equal(ours, theirs)
