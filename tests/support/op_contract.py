"""What every backend's other functions owe the reference, for tests that call them directly; see row_contract.py.

`backend` is a module with the functions of `contract.Backend`; a floor is an RMS error that rounding may cost, see
`assert_accurate`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from camkd_fast import CAMKDFeatureLoss
from camkd_fast.backends import reference
from tests.support.cases import assert_accurate

Floor = Callable[[Tensor], float]


def assert_confidence(
    backend: Any, logits: list[Tensor], target: Tensor, *, forward_floor: float, gradient_floor: Floor
) -> None:
    """Forward and backward of three teachers against float64; row 2 is ignored, whatever it holds."""
    target[2] = -100
    exact = [z.double() for z in logits]
    expected = reference.confidence_forward(exact, target, -100)
    actual = backend.confidence_forward(logits, target, -100)
    for ours, R, N in zip(actual, expected, reference.confidence_forward(logits, target, -100), strict=True):
        assert_accurate(ours, R, N, "confidence", floor=forward_floor)
    grad_ce = torch.randn(target.numel(), 3).t()
    grad_ce[:, 2] = 0.0
    grads = backend.confidence_backward(logits, target, actual[2], grad_ce)
    true = reference.confidence_backward(exact, target, expected[2], grad_ce.double())
    plain = reference.confidence_backward(logits, target, expected[2].float(), grad_ce)
    for ours, R, N in zip(grads, true, plain, strict=True):
        assert_accurate(ours, R, N, "gradient", gradient_floor(ours))


def assert_confidence_edges(backend: Any) -> None:
    """An infinite cross-entropy, a label out of range, a single teacher with an ignored row."""
    logits = [torch.randn(3, 10) for _ in range(2)]
    logits[0][0, 4] = -float("inf")
    target = torch.tensor([4, 10, 5])
    expected = reference.confidence_forward(logits, target, -100)
    for ours, theirs in zip(backend.confidence_forward(logits, target, -100), expected, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    weights, _, _ = backend.confidence_forward(logits[:1], target, 4)
    assert weights.tolist() == [[0.0, 1.0, 1.0]]


def assert_features(
    backend: Any, student: list[Tensor], teachers: list[Tensor], gradient_floor: Floor = lambda ours: 0.0
) -> None:
    """Errors of three teachers, each of its own width, and their gradients against float64."""
    exact = [x.double() for x in student], [x.double() for x in teachers]
    error = backend.feature_forward(student, teachers)
    assert_accurate(error, reference.feature_forward(*exact), reference.feature_forward(student, teachers), "error")
    grad = torch.randn(student[0].shape[0], 3).t()
    true = reference.feature_backward(*exact, grad.double())
    plain = reference.feature_backward(student, teachers, grad)
    for ours, R, N in zip(backend.feature_backward(student, teachers, grad), true, plain, strict=True):
        assert ours.dtype == N.dtype
        assert_accurate(ours, R, N, "gradient", gradient_floor(ours))


def assert_feature_module(name: str) -> None:
    """The module on the backend of that name and on the reference, one set of parameters."""
    criterion = CAMKDFeatureLoss(4, [6, 8], detach_weights=False)
    teachers = [torch.randn(3, 6, 4, 4), torch.randn(3, 8, 2, 2)]
    heads = [lambda f: f.mean((2, 3)), lambda f: f.mean((2, 3))[:, :6]]
    target, grads = torch.tensor([1, 5, 0]), {}
    feature = torch.randn(3, 4, 4, 4)
    for backend in (name, "reference"):
        criterion.backend = backend
        student = feature.clone().requires_grad_()
        criterion(student, teachers, heads, target).loss.backward()
        grads[backend] = student.grad
    torch.testing.assert_close(grads[name], grads["reference"])


def assert_scales_rows(backend: Any, C: int, dtype: torch.dtype) -> None:
    """By one factor, by one for each row and by one that all rows share; into another tensor and in place."""
    residual = torch.randn(5, C).to(dtype)
    for factor in (torch.tensor([0.37]), torch.randn(5), torch.randn(1).expand(5)):
        expected = (residual.double() * factor.double().unsqueeze(1)).to(dtype)
        out = torch.empty_like(residual)
        assert backend.scale_rows(residual, factor, out) is out
        torch.testing.assert_close(out, expected)
        backend.scale_rows(residual, factor, residual)
        assert torch.equal(residual, out)
