"""What the other functions of every backend must satisfy, for tests that call them directly; see row_contract.py.

`backend` is a module with the functions of `camkd_fast.backends.reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from camkd_fast import CAMKDFeatureLoss
from camkd_fast.backends import reference
from tests.support.tolerance import FEW, assert_accurate, assert_near, rms

F32_EPS = torch.finfo(torch.float32).eps

# How a backend rounds float32 values to a dtype; `assert_accurate` assumes to nearest.
Rounding = Callable[[Tensor, torch.dtype], Tensor]


def to_nearest(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values


def assert_confidence(backend: Any, logits: list[Tensor], target: Tensor, rounding: Rounding = to_nearest) -> None:
    """Forward and backward of three teachers; row 2 is ignored, and may contain NaN."""
    target[2] = -100
    exact, narrow = [z.double() for z in logits], [z.float() for z in logits]
    expected = reference.confidence_forward(exact, target, -100)
    actual = backend.confidence_forward(logits, target, -100)
    weights, ce, lse = actual
    # CE and log-sum-exp are differences of numbers of the size of the logits, and weights are functions of CE.
    widest = max(float(z.nan_to_num(0.0, 0.0, 0.0).abs().max()) for z in exact)
    eager = reference.confidence_forward(narrow, target, -100)
    for name, ours, R, N in zip(("weights", "ce", "lse"), actual, expected, eager, strict=True):
        assert_accurate(ours, R, N, name, floor=F32_EPS * (1 + widest))
    assert not weights[:, 2].any() and not ce[:, 2].any()
    grad_ce = torch.randn(target.numel(), 3).t()
    grad_ce[:, 2] = 0.0
    grads = backend.confidence_backward(logits, target, lse, grad_ce)
    true = reference.confidence_backward(exact, target, expected[2], grad_ce.double())
    eager = reference.confidence_backward(narrow, target, expected[2].float(), grad_ce)
    for z, ours, R, N, g in zip(logits, grads, true, eager, grad_ce, strict=True):
        assert ours.dtype == z.dtype
        # The softmax is rebuilt from the stored log-sum-exp; at C = 1 its rounding is all of the gradient.
        floor = F32_EPS * (1 + widest) * rms(g) if ours.numel() < FEW else 0.0
        assert_accurate(ours, rounding(R, ours.dtype), rounding(N, ours.dtype), "gradient", floor)
        assert not ours[2].any()


def assert_confidence_edges(backend: Any) -> None:
    """An infinite cross-entropy, a label out of range, a single teacher with an ignored row."""
    logits = [torch.randn(3, 10) for _ in range(2)]
    logits[0][0, 4] = -float("inf")
    target = torch.tensor([4, 10, 5])
    expected = reference.confidence_forward(logits, target, -100)
    for ours, theirs in zip(backend.confidence_forward(logits, target, -100), expected, strict=True):
        assert_near(ours, theirs)
    weights, _, _ = backend.confidence_forward(logits[:1], target, 4)
    assert weights.tolist() == [[0.0, 1.0, 1.0]]


def assert_features(
    backend: Any, student: list[Tensor], teachers: list[Tensor], rounding: Rounding = to_nearest
) -> None:
    """Errors of three teachers, each of its own width, and their gradients."""
    exact = [x.double() for x in student], [x.double() for x in teachers]
    narrow = [x.float() for x in student], [x.float() for x in teachers]
    error = backend.feature_forward(student, teachers)
    assert_accurate(error, reference.feature_forward(*exact), reference.feature_forward(*narrow), "error")
    grad = torch.randn(student[0].shape[0], 3).t()
    true = reference.feature_backward(*exact, grad.double())
    eager = reference.feature_backward(*narrow, grad)
    grads = backend.feature_backward(student, teachers, grad)
    for r, ours, R, N in zip(student, grads, true, eager, strict=True):
        assert ours.dtype == r.dtype
        assert_accurate(ours, rounding(R, ours.dtype), rounding(N, ours.dtype), "gradient")


def assert_feature_module(name: str) -> None:
    """The module on the backend of that name and on the reference, with the same parameters."""
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
    # Batch normalisation over 12 to 48 values amplifies float32 rounding.
    assert_near(grads[name], grads["reference"], rtol=1e-5)


def assert_scales_rows(backend: Any, C: int, dtype: torch.dtype, rounding: Rounding = to_nearest) -> None:
    """By one factor, by one per row and by one that all rows share; into another tensor and in place.

    The product is formed in float32 and rounded once, so it is exact to the bit.
    """
    gradient = torch.randn(5, C).to(dtype)
    for factor in (torch.tensor([0.37]), torch.randn(5), torch.randn(1).expand(5)):
        expected = rounding(gradient.float() * factor.unsqueeze(1), dtype).to(dtype)
        out = torch.empty_like(gradient)
        assert backend.scale_rows(gradient, factor, out) is out
        assert torch.equal(out, expected)
        backend.scale_rows(gradient, factor, gradient)
        assert torch.equal(gradient, out)


def assert_a_factor_of_1_writes_nothing(backend: Any) -> None:
    """In place. A product would turn the signalling NaNs, which have another bit pattern, into quiet ones."""
    signalling = torch.full((3, 70), 0x7F800001, dtype=torch.int32)
    gradient = signalling.clone().view(torch.float32)
    assert backend.scale_rows(gradient, torch.ones(1), gradient) is gradient
    assert torch.equal(gradient.view(torch.int32), signalling)
    for factor, out in ((torch.full((1,), 2.0), gradient), (torch.ones(1), torch.zeros_like(gradient))):
        backend.scale_rows(signalling.view(torch.float32), factor, out)
        assert out.isnan().all() and not torch.equal(out.view(torch.int32), signalling)
    per_row = torch.tensor([1.0, 2.0, 3.0])
    ones = torch.ones(3, 70)
    assert torch.equal(backend.scale_rows(ones, per_row, ones), per_row.unsqueeze(1).expand(3, 70))
