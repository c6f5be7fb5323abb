"""The tolerance rule: an error is measured against the float64 truth R and the error of eager PyTorch N.

No absolute tolerances: gradients shrink with N and C, so that any fixed one passes a gradient of zero somewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.support.cases import MASKED, Case
from tests.support.evaluate import Result


def rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt()) if values.numel() else 0.0


def assert_accurate(actual: Tensor, R: Tensor, N: Tensor, what: str = "result", floor: float = 0.0) -> None:
    """RMS(actual - R) <= 2 RMS(N - R) + eps(dtype) RMS(R), dtype being that of `actual`.

    N is eager PyTorch in float32 rounded once to that dtype, not eager bfloat16: a kernel computes in float32 and
    rounds once, and against eager bfloat16, which may itself be 10 % off, a 1 % wrong gradient would pass. For the
    same reason eps of a 16-bit dtype is its unit roundoff, half of torch.finfo's. `floor` is for results of a few
    elements (see `roundoff`).
    """
    assert actual.shape == R.shape == N.shape, f"{what}: shapes {actual.shape}, {R.shape}, {N.shape}"
    eps = torch.finfo(actual.dtype).eps / (1 if actual.dtype.itemsize >= 4 else 2)
    N, finite = N.to(actual.dtype), R.isfinite()
    if not finite.all():
        assert torch.equal(actual.double()[~finite], R.double()[~finite]), f"{what}: infinities differ"
        actual, R, N = actual[finite], R[finite], N[finite]
    error, allowed = rms(actual.double() - R), 2 * rms(N.double() - R) + eps * rms(R) + floor
    assert error <= allowed, f"{what}: RMS error {error:.3e} > {allowed:.3e} (RMS of R {rms(R):.3e})"


FEW = 30


def roundoff(case: Case, name: str) -> float:
    """What float32 cannot resolve in `name`, given these logits: a bound for results of a few elements.

    Eager's own error is a yardstick as an RMS over many elements; on one number it can be 0 by luck.
    """
    widest = max(float(z.double().where(z > MASKED, 0.0).abs().max()) for z in (case.student, *case.teachers))
    T, rows = case.temperature, case.target.numel()
    strength = abs(case.hard_weight) + abs(case.soft_weight) * (T if name == "grad" else T * T)
    divisor = 1.0
    if case.reduction == "mean":
        kept = int((case.target != case.ignore_index).sum())
        divisor = max(kept, 1) if case.num_items is None else float(case.num_items)
    added = 1 if name == "grad" or case.reduction == "none" else rows
    if name in ("weights", "teacher_ce", "divergence"):
        strength = divisor = added = 1
    return torch.finfo(torch.float32).eps * strength * (1.0 + widest / min(T, 1.0)) * added / divisor


def assert_result(actual: Result, case: Case, R: Result, N: Result, what: str = "", scale: float = 1.0) -> None:
    """Every number of an evaluation against the rule; `scale` is the largest factor given to the gradient."""
    for name in Result._fields:
        ours, true, plain = getattr(actual, name), getattr(R, name), getattr(N, name)
        if ours is None or true is None:
            continue
        floor = 0.0
        if ours.numel() < FEW or not true.any():  # an R of exactly 0, as for C = 1, leaves the rule no scale
            floor = roundoff(case, name) * (scale if name.startswith("grad") else 1.0)
        assert_accurate(ours, true, plain, f"{what} {name}", floor)
