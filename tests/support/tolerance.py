"""The tolerance rule: an error is measured against the float64 truth R and the error of eager PyTorch N.

There is no absolute tolerance: gradients shrink as N and C grow, so a fixed one accepts a zero gradient at some size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.support.cases import MASKED, Case
from tests.support.evaluate import Result

# Over fewer elements than this the error of eager PyTorch can be 0 by luck, and `roundoff` is allowed as well.
FEW = 30


def rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt()) if values.numel() else 0.0


def unit(dtype: torch.dtype) -> float:
    """eps of float32 and float64; the unit roundoff, half of eps, of 16-bit dtypes."""
    return torch.finfo(dtype).eps / (1 if dtype.itemsize >= 4 else 2)


def _only_finite(actual: Tensor, expected: Tensor, what: str) -> Tensor:
    """Mask of the elements where `expected` is finite; elsewhere `actual` must be the same infinity or NaN."""
    finite = expected.isfinite()
    ours, theirs = actual.double()[~finite], expected.double()[~finite]
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    assert same.all(), f"{what}: {ours[~same][:5].tolist()} instead of {theirs[~same][:5].tolist()}"
    return finite


def assert_accurate(actual: Tensor, R: Tensor, N: Tensor, what: str = "result", floor: float = 0.0) -> None:
    """RMS(actual - R) <= 2 RMS(N - R) + unit(dtype) RMS(R), dtype being that of `actual`.

    N is eager PyTorch in float32, rounded once to that dtype. Eager bfloat16 would be no measure: it may be 10 % off,
    and a gradient that is 1 % wrong would pass. For the same reason the unit of a 16-bit dtype is half its eps.

    Args:
        floor: an RMS error that rounding by itself may cause, for results of a few elements (see `roundoff`).
    """
    assert actual.shape == R.shape == N.shape, f"{what}: shapes {actual.shape}, {R.shape}, {N.shape}"
    finite = _only_finite(actual, R, what)
    actual, R, N = actual[finite], R[finite], N.to(actual.dtype)[finite]
    assert N.isfinite().all(), f"{what}: N is {N[~N.isfinite()][:5].tolist()} where R is finite"
    error, allowed = rms(actual.double() - R), 2 * rms(N.double() - R) + unit(actual.dtype) * rms(R) + floor
    assert error <= allowed, f"{what}: RMS error {error:.3e} > {allowed:.3e} (RMS of R {rms(R):.3e})"


def assert_near(actual: Tensor, expected: Tensor, rtol: float | None = None, what: str = "result") -> None:
    """RMS(actual - expected) <= rtol RMS(expected), for two results of which neither is the truth.

    Args:
        rtol: 16 units of the dtype of `actual` by default, for float32 2e-6.
    """
    assert actual.shape == expected.shape, f"{what}: shapes {actual.shape}, {expected.shape}"
    finite = _only_finite(actual, expected, what)
    actual, expected = actual[finite], expected[finite]
    rtol = 16 * unit(actual.dtype) if rtol is None else rtol
    error, allowed = rms(actual.double() - expected.double()), rtol * rms(expected)
    assert error <= allowed, f"{what}: RMS difference {error:.3e} > {allowed:.3e} (RMS {rms(expected):.3e})"


def truncated(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` cut off at bfloat16, as Triton's interpreter does; other dtypes are rounded in `assert_accurate`."""
    if dtype != torch.bfloat16:
        return values
    low = values.float().view(torch.int32) & 0xFFFF
    return (values.float().view(torch.int32) - low).view(torch.float32).to(values.dtype)


def logit_maps(case: Case) -> list[tuple[float, float | None]]:
    """Scale and softcap of the student and of each teacher."""
    return [case.logit_map(None), *(case.logit_map(k) for k in range(len(case.teachers)))]


def roundoff(case: Case, name: str) -> float:
    """A bound on the error in `name` that float32 rounding of these logits may cause.

    For results of a few elements: the RMS error of N measures rounding over many elements, and may be 0 over one.
    """
    widest = 0.0
    for z, (scale, _) in zip((case.student, *case.teachers), logit_maps(case), strict=True):
        finite = z.double().where(z.isfinite() & (z > MASKED), 0.0)
        widest = max(widest, scale * float(finite.abs().max()) if z.numel() else 0.0)
    T, rows = case.temperature, case.target.numel()
    soft = (1.0 if name == "grad" else T) * (T if case.scale_by_t2 else 1.0 / T)
    strength = abs(case.hard_weight) + abs(case.soft_weight) * soft
    strength += abs(case.z_loss_weight) * (2 * widest + 1) * (1 if name == "grad" else widest + 1)
    divisor = 1.0
    if case.reduction == "mean":
        kept = int((case.target != case.ignore_index).sum())
        divisor = max(kept, 1) if case.num_items is None else float(case.num_items)
    added = 1 if name == "grad" or case.reduction == "none" else rows
    if name in ("weights", "teacher_ce", "divergence", "entropy"):
        strength = divisor = added = 1
    return torch.finfo(torch.float32).eps * strength * (1.0 + widest / min(T, 1.0)) * added / divisor


def assert_result(actual: Result, case: Case, R: Result, N: Result, what: str = "", scale: float = 1.0) -> None:
    """The rule for every number of an evaluation; `scale` is the largest factor given to the gradient."""
    for name in Result._fields:
        ours, true, eager = getattr(actual, name), getattr(R, name), getattr(N, name)
        if ours is None or true is None:
            continue
        floor = 0.0
        if ours.numel() < FEW or not true.any():  # an R of exactly 0, as for C = 1, leaves the rule no scale
            floor = roundoff(case, name) * (scale if name.startswith("grad") else 1.0)
        assert_accurate(ours, true, eager, f"{what} {name}", floor)
