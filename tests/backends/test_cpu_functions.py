"""The functions of the `cpu` backend, called directly: what the losses never pass, such as strided gradients, too."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.support.backends import WITHOUT_MODULE
from tests.support.cases import poisoned_slice
from tests.support.op_contract import (
    LAYOUT_PAIRS,
    assert_confidence,
    assert_confidence_edges,
    assert_counts_valid_rows,
    assert_feature_layouts,
    assert_feature_loss,
    assert_features,
    assert_scales_rows,
)
from tests.support.row_contract import assert_agrees, assert_invalid_second_labels, assert_means

if WITHOUT_MODULE:
    pytest.skip("no compiled module", allow_module_level=True)
from camkd_fast.backends import cpu

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
agree = functools.partial(assert_agrees, cpu.row_loss)


@pytest.mark.parametrize("C", [1, 10, 101, 3000])
@pytest.mark.parametrize("dtypes", [(F32,), (BF16,), (F32, BF16, F16)], ids=["float32", "bfloat16", "mixed"])
def test_confidence(C: int, dtypes: tuple[torch.dtype, ...]) -> None:
    """With an ignored row of NaN and a padded slice."""
    logits = [(3 * torch.randn(4, C)).to(dtypes[k % len(dtypes)]) for k in range(3)]
    logits[1] = poisoned_slice(logits[1], 8)
    logits[0][2] = float("nan")
    assert_confidence(cpu, logits, torch.randint(C, (4,)))


def test_confidence_edges() -> None:
    assert_confidence_edges(cpu)


@pytest.mark.parametrize("mixed", [False, True])
def test_features(mixed: bool) -> None:
    student = [torch.randn(3, 100), torch.randn(3, 5300), torch.randn(3, 40)[:, :33]]
    teachers = [torch.randn(3, 100), torch.randn(3, 5300), torch.randn(3, 33)]
    if mixed:
        student[1], teachers[0] = student[1].to(BF16), teachers[0].to(F16)
    assert_features(cpu, student, teachers)


@pytest.mark.parametrize(("first", "second"), LAYOUT_PAIRS)
def test_feature_layouts(first: str, second: str) -> None:
    assert_feature_layouts(cpu, first, second)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_gradient_beyond_the_cache(dtype: torch.dtype) -> None:
    """Large enough for stores that bypass it, at addresses of any alignment."""
    student = [torch.randn(3, size).to(dtype) for size in (700_000, 1003)]
    teachers = [torch.randn_like(r) for r in student]
    student[0][1] = float("nan")
    assert_feature_loss(cpu, student, teachers)
    assert_feature_loss(cpu, [r[:, 1:] for r in student], [f[:, 1:] for f in teachers])


def test_confidence_counts_valid_rows() -> None:
    assert_counts_valid_rows(cpu, 10)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("C", [1, 10, 101])
def test_scale_rows(dtype: torch.dtype, C: int) -> None:
    assert_scales_rows(cpu, C, dtype)


@pytest.mark.parametrize("N", [1, 17])
@pytest.mark.parametrize("layout", ["per teacher", "transposed", "every other row"])
def test_given_weights_of_any_strides(layout: str, N: int) -> None:
    weights = {
        "per teacher": torch.rand(3, 1).expand(3, N),
        "transposed": torch.rand(N, 3).t(),
        "every other row": torch.rand(3, 2 * N)[:, ::2],
    }[layout]
    student, *teachers = (torch.randn(N, 50) for _ in range(4))
    agree(student, teachers, torch.randint(50, (N,)), weighting=weights)


@pytest.mark.parametrize("scale", [8.0, torch.tensor([8.0])], ids=["number", "tensor"])
def test_means(scale: float | torch.Tensor) -> None:
    student, *teachers = (torch.randn(20, 50) for _ in range(4))
    assert_means(cpu.row_loss, student, teachers, torch.randint(50, (20,)), scale)


@pytest.mark.parametrize("label", [-1, 40, -100, 7])
def test_invalid_second_labels_are_nan(label: int) -> None:
    assert_invalid_second_labels(cpu, label)


@pytest.mark.parametrize("target", [[50, 3, -1], [3, -7, 200]])
def test_labels_out_of_range_give_nan_rows(target: list[int]) -> None:
    """The losses refuse such labels; a kernel that is called without that check must not read beyond the row."""
    student, *teachers = (torch.randn(3, 50) for _ in range(4))
    agree(student, teachers, torch.tensor(target))
    agree(student, teachers, torch.tensor(target), hard_weight=0.0, weighting="uniform")
