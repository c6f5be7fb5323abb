"""The other CUDA kernels executed on the host: confidence weights, feature errors and scaled rows.

test_row_loss_on_host.py describes how.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from camkd_fast import weighted_feature_loss
from tests.support.cases import poisoned_slice
from tests.support.op_contract import (
    LAYOUT_PAIRS,
    assert_a_factor_of_1_writes_nothing,
    assert_confidence,
    assert_confidence_edges,
    assert_counts_valid_rows,
    assert_feature_layouts,
    assert_feature_loss,
    assert_feature_module,
    assert_features,
    assert_scales_rows,
)

pytest.importorskip("camkd_fast._C")
pytest.importorskip("pybind11")
from camkd_fast.backends import cuda as cuda_backend
from tests.cuda.host.on_host import cuda_on_the_host, emulated, limit

__all__ = ["cuda_on_the_host", "emulated"]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAN = float("nan")


@pytest.mark.parametrize("C", [1, 10, 101, 3000])
@pytest.mark.parametrize("dtype", [F32, BF16, None], ids=["fp32", "bf16", "mixed"])
def test_confidence(C: int, dtype: torch.dtype | None) -> None:
    """With an ignored row of NaN and a padded slice."""
    dtypes = (F32, BF16, F16) if dtype is None else (dtype,) * 3
    logits = [(3 * torch.randn(4, C)).to(d) for d in dtypes]
    logits[1] = poisoned_slice(logits[1], 8)
    logits[0][2] = NAN
    target = torch.randint(C, (4,))
    assert_confidence(cuda_backend, logits, target)


def test_confidence_edges() -> None:
    assert_confidence_edges(cuda_backend)


@pytest.mark.parametrize("mixed", [False, True])
def test_features(mixed: bool) -> None:
    """Teachers of different widths, dtypes and row strides; a warp and a block per sample."""
    student = [torch.randn(3, 100), torch.randn(3, 1300), torch.randn(3, 40)[:, :33]]
    teachers = [torch.randn(3, 100), torch.randn(3, 1300), torch.randn(3, 33)]
    if mixed:
        student[1], teachers[0] = student[1].to(BF16), teachers[0].to(F16)
    assert_features(cuda_backend, student, teachers)


@pytest.mark.parametrize(("first", "second"), LAYOUT_PAIRS)
def test_feature_layouts(first: str, second: str) -> None:
    assert_feature_layouts(cuda_backend, first, second)


@pytest.mark.parametrize("separate", [False, True], ids=["last block", "second launch"])
@pytest.mark.parametrize("multiprocessors", [2, 64], ids=["whole samples", "parts"])
def test_feature_loss(emulated: ModuleType, multiprocessors: int, separate: bool) -> None:
    """Large samples, by one block or several each; added up by a second launch or by the last block."""
    limit(emulated, multiprocessors=multiprocessors)
    emulated.set_grid(False, separate)
    student = [torch.randn(3, size) for size in (5000, 2101, 40)]
    teachers = [torch.randn_like(r).to(BF16) for r in student]
    student[0][1] = NAN
    assert_feature_loss(cuda_backend, student, teachers)
    student, teachers = [torch.randn(2, 3, 70, 40)], [torch.randn(2, 3, 40, 70).transpose(2, 3)]
    assert_feature_loss(cuda_backend, student, teachers)
    emulated.set_grid(False, False)


def test_no_samples() -> None:
    maps, weights = torch.ones(0, 5, requires_grad=True), torch.ones(1, 0)
    weighted_feature_loss([maps], [torch.ones(0, 5)], weights, backend="cuda").backward()
    assert maps.grad is not None and maps.grad.shape == (0, 5)
    result = cuda_backend.feature_loss([torch.ones(0, 5)], [torch.ones(0, 5)], torch.ones(1, 0), needs_grad=True)
    assert result.loss == 0 and result.error.shape == (1, 0) and result.grads[0].shape == (0, 5)


@pytest.mark.parametrize("C", [10, 3000])
def test_confidence_counts_valid_rows(C: int) -> None:
    assert_counts_valid_rows(cuda_backend, C)


def test_feature_loss_module() -> None:
    assert_feature_module("cuda")


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("C", [1, 10, 101])
def test_scale_rows(dtype: torch.dtype, C: int) -> None:
    assert_scales_rows(cuda_backend, C, dtype)


def test_a_factor_of_1_writes_nothing() -> None:
    assert_a_factor_of_1_writes_nothing(cuda_backend)
