"""Accuracy of gradients on the GPU: converged students, and labels far from the maximum.

The cases of tests/cuda/test_row_loss_accuracy.py, at widths where the CUDA C++ kernels give a row to a warp, a block, a
cluster or a cooperative group, or read it twice.
"""

from __future__ import annotations

import pytest
import torch

from tests.support.cases import on
from tests.support.converged import FAR, NEAR, all_converged, assert_rounded_once, assert_rows, labels_at
from tests.support.evaluate import run_value_and_grad
from tests.support.gpu import Place

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
WIDTHS = (400, 4096, 32000)


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("K", [1, 3, 5])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, 20.0])
def test_converged_students(place: Place, temperature: float, K: int, dtype: torch.dtype) -> None:
    for what, case in all_converged(6, 400, K, dtype, temperature):
        moved = on(case, place.device)
        assert_rounded_once(run_value_and_grad(moved, place.backend).grad, moved, what)


@pytest.mark.parametrize("two_labels", [False, True])
@pytest.mark.parametrize("C", WIDTHS)
def test_converged_students_at_every_width(place: Place, C: int, two_labels: bool) -> None:
    for what, case in all_converged(2, C, 3, BF16, 4.0, two_labels):
        moved = on(case, place.device)
        assert_rounded_once(run_value_and_grad(moved, place.backend).grad, moved, what)


def check_labels(place: Place, C: int, temperature: float, dtype: torch.dtype) -> None:
    distances = [FAR[0], *NEAR, FAR[1], NEAR[1], *FAR]
    assert_rows(on(labels_at(distances, C, 3, dtype, temperature), place.device), place.backend)


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("C", WIDTHS)
def test_labels_far_from_the_maximum(place: Place, C: int, temperature: float, dtype: torch.dtype) -> None:
    check_labels(place, C, temperature, dtype)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("C", [262144, 2_000_000], ids=["by a cooperative group", "in two reads"])
def test_labels_far_from_the_maximum_of_the_widest_rows(gpu: Place, C: int, dtype: torch.dtype) -> None:
    check_labels(gpu, C, 4.0, dtype)
