"""The CUDA kernels beside the logit loss, executed on the host (see test_cuda_host.py): confidence weights, feature
errors, scaled rows.
"""

from __future__ import annotations

import pytest
import torch
from helpers import FEW, assert_accurate, poisoned_slice

from camkd_fast import CAMKDFeatureLoss, reference

pytest.importorskip("camkd_fast._C")
pytest.importorskip("pybind11")
from camkd_fast import cuda_kernels
from tests.cuda_host.on_host import cuda_on_the_host, emulated

__all__ = ["cuda_on_the_host", "emulated"]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("C", [1, 10, 101, 3000])
@pytest.mark.parametrize("dtype", [F32, BF16, None], ids=["fp32", "bf16", "mixed"])
def test_confidence(C: int, dtype: torch.dtype | None) -> None:
    """Forward and backward against the reference in float64; ignored NaN rows, a padded slice."""
    dtypes = (F32, BF16, F16) if dtype is None else (dtype,) * 3
    logits = [(3 * torch.randn(4, C)).to(d) for d in dtypes]
    logits[1] = poisoned_slice(logits[1], 8)
    logits[0][2] = NAN
    target = torch.randint(C, (4,))
    target[2] = -100
    exact = [z.double() for z in logits]
    expected = reference.confidence_forward(exact, target, -100)
    actual = cuda_kernels.confidence_forward(logits, target, -100)
    for ours, theirs, plain in zip(actual, expected, reference.confidence_forward(logits, target, -100), strict=True):
        assert_accurate(ours, theirs, plain, "confidence", floor=5e-7)
    grad_ce = torch.randn(4, 3).t()
    grad_ce[:, 2] = 0.0
    theirs = reference.confidence_backward(exact, target, expected[2], grad_ce.double())
    plain = reference.confidence_backward(logits, target, expected[2].float(), grad_ce)
    for ours, R, N in zip(
        cuda_kernels.confidence_backward(logits, target, actual[2], grad_ce), theirs, plain, strict=True
    ):
        assert_accurate(ours, R, N, "gradient", 1e-6 if ours.numel() < FEW else 0.0)


def test_confidence_edges() -> None:
    logits = [torch.randn(3, 10) for _ in range(2)]
    logits[0][0, 4] = -INF
    target = torch.tensor([4, 10, 5])
    for ours, theirs in zip(
        cuda_kernels.confidence_forward(logits, target, -100),
        reference.confidence_forward(logits, target, -100),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    weights, _, _ = cuda_kernels.confidence_forward(logits[:1], target, 4)
    assert weights.tolist() == [[0.0, 1.0, 1.0]]


@pytest.mark.parametrize("mixed", [False, True])
def test_features(mixed: bool) -> None:
    """Widths, dtypes and row strides that differ between teachers; a warp and a block per sample."""
    student = [torch.randn(3, 100), torch.randn(3, 1300), torch.randn(3, 40)[:, :33]]
    teachers = [torch.randn(3, 100), torch.randn(3, 1300), torch.randn(3, 33)]
    if mixed:
        student[1], teachers[0] = student[1].to(BF16), teachers[0].to(F16)
    exact = [x.double() for x in student], [x.double() for x in teachers]
    error = cuda_kernels.feature_forward(student, teachers)
    assert_accurate(error, reference.feature_forward(*exact), reference.feature_forward(student, teachers), "error")
    grad = torch.randn(3, 3).t()
    actual = cuda_kernels.feature_backward(student, teachers, grad)
    plain = reference.feature_backward(student, teachers, grad)
    for ours, R, N in zip(actual, reference.feature_backward(*exact, grad.double()), plain, strict=True):
        assert ours.dtype == N.dtype
        assert_accurate(ours, R, N, "gradient")


def test_feature_loss_module() -> None:
    """The module on this backend and on the reference, one set of parameters."""
    criterion = CAMKDFeatureLoss(4, [6, 8], detach_weights=False)
    teachers = [torch.randn(3, 6, 4, 4), torch.randn(3, 8, 2, 2)]
    heads = [lambda f: f.mean((2, 3)), lambda f: f.mean((2, 3))[:, :6]]
    target, grads = torch.tensor([1, 5, 0]), {}
    feature = torch.randn(3, 4, 4, 4)
    for backend in ("cuda", "reference"):
        criterion.backend = backend
        student = feature.clone().requires_grad_()
        criterion(student, teachers, heads, target).loss.backward()
        grads[backend] = student.grad
    torch.testing.assert_close(grads["cuda"], grads["reference"])


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("C", [1, 10, 101])
def test_scale_rows(dtype: torch.dtype, C: int) -> None:
    residual = torch.randn(5, C).to(dtype)
    for factor in (torch.tensor([0.37]), torch.randn(5), torch.randn(1).expand(5)):
        expected = (residual.double() * factor.double().unsqueeze(1)).to(dtype)
        out = torch.empty_like(residual)
        assert cuda_kernels.scale_rows(residual, factor, out) is out
        torch.testing.assert_close(out, expected)
        cuda_kernels.scale_rows(residual, factor, residual)
        assert torch.equal(residual, out)
