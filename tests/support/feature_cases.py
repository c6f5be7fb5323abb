"""Feature maps with their logits and labels, and the check of camkd_feature_loss_and_grad against float64 autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from camkd_fast import camkd_feature_loss_and_grad
from tests.support.tolerance import assert_accurate, rms

SHAPES = [(6, 9, 5, 3), (6, 4, 1, 1), (6, 16, 4, 4)]


class Maps(NamedTuple):
    """The tensors of a call."""

    student: list[Tensor]
    teachers: list[Tensor]
    logits: list[Tensor]
    target: Tensor

    def to(self, device: torch.device) -> Maps:
        """The same on another device; memory formats stay."""
        return Maps(*([x.to(device) for x in tensors] for tensors in self[:3]), self.target.to(device))


def make(
    dtype: torch.dtype = torch.float32,
    teacher_dtype: torch.dtype | None = None,
    shapes: list[tuple[int, ...]] = SHAPES,
    ignored: tuple[int, ...] = (2,),
) -> Maps:
    generator = torch.Generator().manual_seed(4)
    # Not centred and of different sizes, so that a mean over the wrong axis or a swapped teacher shows.
    student = [(torch.rand(s, generator=generator) * (k + 1)).to(dtype) for k, s in enumerate(shapes)]
    teachers = [(torch.rand(s, generator=generator) * 3 - 1).to(teacher_dtype or dtype) for s in shapes]
    N = shapes[0][0]
    logits = [torch.randn(N, 10, generator=generator) for _ in shapes]
    target = torch.randint(10, (N,), generator=generator)
    target[list(ignored)] = -100
    return Maps(student, teachers, logits, target)


def expected(
    maps: Maps,
    dtype: torch.dtype,
    *,
    beta: float = 1.0,
    weighting: str | Tensor = "confidence",
    reduction: str = "mean",
    ignore_index: int = -100,
    num_items: Any = None,
    loss_scale: Any = 1.0,
) -> list[Tensor]:
    """Loss, weights and gradients by autograd in `dtype`."""
    K, kept = len(maps.student), maps.target != ignore_index
    leaves = [r.detach().to(dtype).requires_grad_() for r in maps.student]
    if isinstance(weighting, Tensor):
        weights = weighting.detach().to(dtype).view(K, -1).expand(K, len(kept))
    elif weighting == "uniform" or K == 1:
        weights = torch.full((K, len(kept)), 1 / K, dtype=dtype, device=kept.device)
    else:
        label = maps.target.where(kept, 0)
        ce = torch.stack([F.cross_entropy(z.to(dtype), label, reduction="none") for z in maps.logits])
        weights = (1 - ce.softmax(0)) / (K - 1)
    weights = weights.where(kept, 0.0)
    rows = sum(
        w * (r - f.to(dtype)).square().flatten(1).mean(1)
        for w, r, f in zip(weights, leaves, maps.teachers, strict=True)
    )
    rows = beta * rows.where(kept, 0.0)
    divisor = 1.0
    if reduction == "mean":
        divisor = kept.sum().clamp(min=1) if num_items is None else float(num_items)
    total = rows.sum() / divisor
    (total * float(loss_scale)).backward()
    loss = rows if reduction == "none" else total
    # An ignored sample may be NaN, which autograd multiplies by 0.
    grads = [leaf.grad.where(kept.view(-1, *[1] * (leaf.dim() - 1)), 0.0) for leaf in leaves]
    return [loss.detach(), weights.detach(), *grads]


def check(maps: Maps, backend: str, **options: Any) -> None:
    """Value and gradient by the tolerance rule."""
    out, grads = camkd_feature_loss_and_grad(*maps, backend=backend, **options)
    assert not any(x.requires_grad for x in (out.loss, out.weights, *grads))
    results = [out.loss, out.weights, *grads]
    R, N = (expected(maps, dtype, **options) for dtype in (torch.float64, torch.float32))
    assert [x.dtype for x in results] == [torch.float32] * 2 + [r.dtype for r in maps.student]
    for i, (ours, true, eager) in enumerate(zip(results, R, N, strict=True)):
        # Few elements, or weights of float32 cross-entropies: the rounding of the logits counts as well.
        floor = 4e-7 * rms(true) + (2.0**-24 if ours.dtype == torch.float16 else 0.0)
        assert_accurate(ours, true, eager, f"result {i}", floor)
