"""Random cases of the logit loss for hypothesis, and their check against float64."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import torch

from tests.support.cases import MASKED, Case, poisoned_slice, second_labels
from tests.support.evaluate import Result, fields, run, run_value_and_grad
from tests.support.tensor_kinds import dense
from tests.support.tolerance import assert_accurate, rms
from tests.support.truth import naive, truth

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "padded", "transposed", "expanded", "rows", "columns"]


def lay_out(z: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "padded":
        return poisoned_slice(z, pad=z.shape[-1] % 7, offset=1 + z.shape[-1] % 3)
    if layout == "transposed" and z.dim() > 1:
        return z.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded" and z.dim() > 1 and z.shape[0]:
        return z[:1].expand_as(z)
    if layout == "rows" and z.dim() > 1:
        return torch.stack([z, torch.full_like(z, math.nan)], 1).flatten(0, 1)[::2]
    if layout == "columns":
        return torch.stack([z, torch.full_like(z, math.nan)], -1).flatten(-2)[..., ::2]
    return z


@st.composite
def cases(draw: Any, most_rows: int = 6, most_teachers: int = 16) -> Case:
    lead = tuple(draw(st.lists(st.integers(1, most_rows), max_size=3)))
    if draw(st.integers(0, 40)) == 0:
        lead = (0, *lead)[:3]
    C = draw(st.one_of(st.integers(1, 70), st.sampled_from([100, 127, 128, 129, 1000, 1128, 4097, 8193])))
    K = draw(st.one_of(st.integers(1, 5), st.just(most_teachers)))
    N = math.prod(lead)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    scales = st.sampled_from([0.0, 0.1, 1.0, 5.0, 20.0])
    peak, peaks_second = draw(st.sampled_from([0.0, 0.0, 10.0])), draw(st.booleans())
    masked = torch.rand(C, generator=generator) < draw(st.sampled_from([0.0, 0.0, 0.3, 0.9]))
    masked[int(torch.randint(C, (), generator=generator))] = False
    allowed = torch.arange(C)[~masked]
    target = allowed[torch.randint(len(allowed), (N,), generator=generator)]
    ignore_index = draw(st.sampled_from([-100, -1, 0]))
    ignored = torch.rand(N, generator=generator) < draw(st.sampled_from([0.0, 0.0, 0.3, 1.0]))
    given = target.masked_fill(ignored, ignore_index)
    second = second_labels(given, allowed, ignore_index, generator) if draw(st.booleans()) else {}
    unmasked = torch.cat([target, second["second_target"][given != ignore_index]]) if second else target
    own_mask = draw(st.booleans())

    def logits(dtype: torch.dtype, teacher: bool) -> torch.Tensor:
        z = torch.randn(N, C, generator=generator) * draw(scales)
        z += draw(st.sampled_from([0.0, 0.0, 30.0, -50.0]))
        peaked = second["second_target"].clamp(min=0) if second and peaks_second else target
        z.scatter_add_(1, peaked.unsqueeze(1), torch.full((N, 1), peak))
        z.masked_fill_(masked, -math.inf)
        if teacher and own_mask:
            # Labels stay unmasked in every row, because an expanded layout repeats one row.
            extra = torch.rand(N, C, generator=generator) < 0.2
            extra[:, unmasked] = False
            z.masked_fill_(extra, -math.inf)
        return lay_out(z.to(dtype).view(*lead, C), draw(st.sampled_from(LAYOUTS)))

    student = logits(draw(st.sampled_from(FLOATS)), teacher=False)
    teachers = [logits(draw(st.sampled_from(FLOATS)), teacher=True) for _ in range(K)]
    if draw(st.integers(0, 5)) == 0:
        teachers = [student] * K
    weighting = draw(st.sampled_from(["confidence", "uniform", "entropy", "per teacher", "per row"]))
    if weighting.startswith("per"):
        shape = (K,) if weighting == "per teacher" else (K, *lead)
        weighting = torch.rand(shape, generator=generator) * 2 - draw(st.sampled_from([0.0, 0.5]))
    reduction = draw(st.sampled_from(["mean", "sum", "none"]))
    return Case(
        student,
        tuple(teachers),
        given.view(lead),
        temperature=draw(st.one_of(st.sampled_from([1, 2.0, 4.0, 20.0]), st.floats(0.5, 10.0))),
        hard_weight=draw(st.sampled_from([0.0, 0.5, 1.0, -1.0])),
        soft_weight=draw(st.sampled_from([0.0, 0.5, 1.0, 3.0])),
        weighting=weighting,
        reduction=reduction,
        ignore_index=ignore_index,
        num_items=draw(st.sampled_from([None, 7, 2.5, torch.tensor(3)])) if reduction == "mean" else None,
        **{name: value.view(lead) for name, value in second.items()},
    )


def magnitude(case: Case, weights: torch.Tensor) -> dict[str, float]:
    """Size of the terms that are added and subtracted to form each result, in float64."""
    C, T = case.student.shape[-1], case.temperature
    s, *zs = (z.double().reshape(-1, C).clamp(min=MASKED) for z in (case.student, *case.teachers))
    w = weights.reshape(len(zs), -1, 1).abs()
    mixture = sum(w_k * (z / T).softmax(1) for w_k, z in zip(w, zs, strict=True))
    q = (s / T).softmax(1)
    grad = abs(case.soft_weight) * T * (w.sum(0) * q + mixture) + abs(case.hard_weight) * (s.softmax(1) + 1 / C)
    # The logarithm of a probability is a difference of numbers of the size of the logits.
    widest = max([1.0, *(float(z.where(z > MASKED, 0.0).abs().max()) for z in (s, *zs) if z.numel())])
    unsure = 1.0
    if case.weighting == "entropy" and w.numel():
        # The entropy of a nearly certain teacher is mostly rounding error, and so is a ratio of such entropies.
        entropy = sum(torch.special.entr(z.softmax(1)).sum(1) for z in zs)
        unsure += 1.0 / max(float(entropy.min()), 1e-9)
    total = float(w.sum(0).mean()) if w.numel() else 0.0
    soft = total * T * T * (1 + 2 * widest / T) * unsure
    return {
        "loss": abs(case.hard_weight) * 2 * widest + abs(case.soft_weight) * soft,
        "hard": 2 * widest,
        "soft": soft,
        "weights": 4 * widest * unsure,
        "teacher_ce": 2 * widest,
        "divergence": 2 * widest / T + 1,
        "grad": rms(grad) * widest * unsure,
    }


Evaluation = Callable[[Case, str, torch.Tensor | None], Result]


def value_and_grad(case: Case, backend: str, grad_output: torch.Tensor | None) -> Result:
    assert grad_output is None
    return run_value_and_grad(case, backend)


def check(
    case: Case,
    backend: str,
    given: Case | None = None,
    evaluations: tuple[Evaluation, ...] = (run, value_and_grad),
    circumstances: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> None:
    """Against float64.

    Args:
        given: the same values in other tensors, for the evaluations.
        circumstances: a context for the evaluations.
    """
    rows, kept = case.target.numel(), int((case.target != case.ignore_index).sum())
    divisor = 1.0
    if case.reduction == "mean":
        divisor = max(kept, 1) if case.num_items is None else float(case.num_items)
    grad_output = torch.linspace(-1, 2, rows).view(case.target.shape) if case.reduction == "none" else None
    R, N = truth(case, grad_output), naive(case, grad_output)
    sizes = magnitude(case, R.weights)
    eps = torch.finfo(torch.float32).eps
    for evaluation in evaluations:
        if grad_output is not None and evaluation is value_and_grad:
            continue
        with circumstances():
            ours = evaluation(case if given is None else given, backend, grad_output)
        ours = Result(*(value if value is None else dense(value) for value in ours))
        for name, size in sizes.items():
            reduced = name in ("loss", "hard", "soft") and case.reduction != "none"
            scale = max(kept, 1) / divisor if reduced else 2 / divisor if name == "grad" else 1.0
            # Eager may be exact by luck over a few elements, and float16 gradients may be subnormal, 2^-24 apart.
            floor = 4 * eps * size * scale
            if name == "grad" and ours.grad.dtype == torch.float16:
                floor += 2.0**-24
            assert_accurate(getattr(ours, name), getattr(R, name), getattr(N, name), name, floor)
        # Labels are unmasked and masks of the student apply to the teachers too, so every result is finite.
        assert all(x.isfinite().all() for x in (*fields(ours), ours.grad))
        assert (ours.grad[case.target == case.ignore_index] == 0).all()
