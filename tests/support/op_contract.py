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
from camkd_fast.backends.contract import SecondLabels
from camkd_fast.backends.feature_maps import gradient_strides
from tests.support.cases import second_labels
from tests.support.tolerance import FEW, assert_accurate, assert_near, rms

F32_EPS = torch.finfo(torch.float32).eps

# How a backend rounds float32 values to a dtype; `assert_accurate` assumes to nearest.
Rounding = Callable[[Tensor, torch.dtype], Tensor]


def to_nearest(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values


def assert_confidence(backend: Any, logits: list[Tensor], target: Tensor, rounding: Rounding = to_nearest) -> None:
    """Forward and backward of three teachers, with one label and with two. Row 2 is ignored, and may contain NaN."""
    target[2] = -100
    labels = second_labels(target, torch.arange(logits[0].shape[-1]), -100, torch.Generator().manual_seed(0))
    for second in (None, SecondLabels(labels["second_target"], labels["mix"])):
        _assert_confidence(backend, logits, target, second, rounding)


def _assert_confidence(
    backend: Any, logits: list[Tensor], target: Tensor, second: SecondLabels | None, rounding: Rounding
) -> None:
    exact, narrow = [z.double() for z in logits], [z.float() for z in logits]
    wide = None if second is None else second._replace(mix=second.mix.double())
    expected = reference.confidence_forward(exact, target, -100, second=wide)
    actual = backend.confidence_forward(logits, target, -100, second=second)
    weights, ce, lse = actual
    # CE and log-sum-exp are differences of numbers of the size of the logits, and weights are functions of CE.
    widest = max(float(z.nan_to_num(0.0, 0.0, 0.0).abs().max()) for z in exact)
    eager = reference.confidence_forward(narrow, target, -100, second=second)
    for name, ours, R, N in zip(("weights", "ce", "lse"), actual, expected, eager, strict=True):
        assert_accurate(ours, R, N, name, floor=F32_EPS * (1 + widest))
    assert not weights[:, 2].any() and not ce[:, 2].any()
    grad_ce = torch.randn(target.numel(), 3).t()
    grad_ce[:, 2] = 0.0
    grads = backend.confidence_backward(logits, target, lse.t().contiguous().t(), grad_ce, second)
    true = reference.confidence_backward(exact, target, expected[2], grad_ce.double(), wide)
    eager = reference.confidence_backward(narrow, target, expected[2].float(), grad_ce, second)
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


def assert_counts_valid_rows(backend: Any, C: int) -> None:
    """`inverse_valid` of confidence_forward, which leaves the results as they are."""
    logits = [torch.randn(5, C) for _ in range(2)]
    for ignored in (0, 2, 5):
        target = torch.arange(5).masked_fill(torch.arange(5) < ignored, -100)
        inverse = torch.full((1,), float("nan"))
        results = backend.confidence_forward(logits, target, -100, inverse)
        assert inverse == 1 / torch.tensor(max(5.0 - ignored, 1.0))
        others = backend.confidence_forward(logits, target, -100)
        assert all(torch.equal(a, b) for a, b in zip(results, others, strict=True))


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


# Memory formats of maps (N, D, H, W); each keeps the values. "every other" needs a copy: no two strides describe it.
MAP_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "columns": lambda x: torch.cat([x, x * float("nan")], 3)[..., : x.shape[3]],
    "samples": lambda x: torch.stack([x, x * float("nan")], 1).flatten(0, 1)[::2],
    "expanded": lambda x: x[:1].expand_as(x),
    "every other": lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, ::2, ::2],
}


def assert_feature_loss(
    backend: Any, student: list[Tensor], teachers: list[Tensor], rounding: Rounding = to_nearest
) -> None:
    """Loss, errors and gradients in one pass. The second sample of the first pair has weight 0, and may be NaN."""
    exact = [x.double() for x in student], [x.double() for x in teachers]
    narrow = [x.float() for x in student], [x.float() for x in teachers]
    K, N = len(student), student[0].shape[0]
    weights = torch.rand(N, K).t()
    weights[0, 1] = 0.0
    for scale, grad_scale, together in (
        (0.25, 1.0, False),
        (torch.tensor([0.25]), 8.0, True),
        (3.0, torch.tensor([8.0]), False),
    ):
        options = {"needs_grad": True, "scale": scale, "grad_scale": grad_scale, "together": together}
        ours = backend.feature_loss(student, teachers, weights, **options)
        R, eager = (
            reference.feature_loss(*maps, weights.to(dtype), **options)
            for maps, dtype in ((exact, torch.float64), (narrow, torch.float32))
        )
        assert_accurate(ours.loss, R.loss, eager.loss, "loss", floor=4 * F32_EPS * float(R.loss))
        assert_accurate(ours.error, R.error, eager.error, "error", floor=F32_EPS * rms(R.error))
        for r, grad, true, other in zip(student, ours.grads, R.grads, eager.grads, strict=True):
            assert (grad.dtype, grad.stride()) == (r.dtype, gradient_strides(r))
            assert_accurate(grad, rounding(true, grad.dtype), rounding(other, grad.dtype), "gradient")
        assert not ours.grads[0][1].any()
        assert (ours.buffer is not None) == together
        if together:
            assert {grad.untyped_storage().data_ptr() for grad in ours.grads} == {ours.buffer.data_ptr()}
            assert all(grad.data_ptr() % 16 == ours.buffer.data_ptr() % 16 for grad in ours.grads)
    value = backend.feature_loss(student, teachers, weights, needs_grad=False, scale=3.0)
    assert not value.grads
    assert_near(value.loss, ours.loss)  # other bits where only the gradient is unaligned
    assert_near(value.error, ours.error)


# All formats for both, and each beside a contiguous and a channels_last map.
LAYOUT_PAIRS = sorted(
    {(name, name) for name in MAP_LAYOUTS}
    | {pair for name in MAP_LAYOUTS for pair in ((name, "contiguous"), ("contiguous", name), ("channels_last", name))}
)


def assert_feature_layouts(backend: Any, first: str, second: str, rounding: Rounding = to_nearest) -> None:
    """Maps of student and teacher in these memory formats, whose dtypes differ."""
    kinds = ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16), (torch.float16, torch.float32))
    for dtype, other in kinds[: 3 if first == second else 1]:
        student = [torch.randn(3, *size).to(dtype) for size in ((5, 7, 4), (40, 6, 6), (3, 1, 1))]
        teachers = [torch.randn_like(r).to(other) for r in student]
        if first != "expanded":
            student[0][1] = float("nan")
        student, teachers = [MAP_LAYOUTS[first](r) for r in student], [MAP_LAYOUTS[second](f) for f in teachers]
        assert_feature_loss(backend, student, teachers, rounding)


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
    # 0 stays 0, as the gradient of an ignored row
    gradient[1], gradient[3, : C // 2] = 0.0, 0.0
    for factor in (torch.tensor([float("inf")]), torch.tensor([1.0, float("nan"), float("inf"), float("-inf"), 2.0])):
        found = backend.scale_rows(gradient, factor, torch.empty_like(gradient))
        wanted = (gradient.float() * factor.unsqueeze(1)).masked_fill(gradient == 0, 0.0)
        assert torch.equal(found.float().nan_to_num(7.0), rounding(wanted, dtype).to(dtype).float().nan_to_num(7.0))


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
