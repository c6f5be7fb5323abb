"""Cases that show the accuracy of gradients: students that have nearly converged, and labels far from the maximum."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tests.support.cases import Case
from tests.support.evaluate import run_value_and_grad
from tests.support.tolerance import assert_accurate, assert_result, rms
from tests.support.truth import naive, truth

DISTANCES = (0.3, 0.03, 0.003)  # between the logits of student and teachers
KINDS = ("same label", "label off by 3", "student at the mean")
# A gradient may have this many times the error of rounding it once to its dtype.
ROUNDINGS = 1.4
# Logits of a label, others being near 0: beyond the safe range of the fast path for every dtype, and within it.
FAR, NEAR = (-300.0, -150.0), (300.0, 0.0, 5.0, -8.0)


def converged(
    N: int,
    C: int,
    K: int,
    dtype: torch.dtype,
    temperature: float,
    *,
    distance: float,
    peaked: bool,
    kind: str,
    two_labels: bool = False,
) -> Case:
    """Student and teachers at `distance` from common logits, without the hard loss.

    The gradient is then a small difference of large terms, which shows every rounding that comes before the difference.
    """
    generator = torch.Generator().manual_seed(C + 31 * K + int(1000 * distance) + peaked)

    def randn() -> Tensor:
        return torch.randn(N, C, generator=generator)

    common = 3 * randn() if peaked else randn()
    target = torch.randint(C, (N,), generator=generator)
    if peaked:
        common.scatter_add_(1, target.unsqueeze(1), torch.full((N, 1), 12.0))
    teachers = tuple((common + distance * randn()).to(dtype) for _ in range(K))
    student = common + distance * randn()
    if kind == "label off by 3":
        student.scatter_add_(1, target.unsqueeze(1), torch.full((N, 1), 3.0))
    if kind == "student at the mean":
        mixture = torch.stack([(z.double() / temperature).softmax(1) for z in teachers]).mean(0)
        student = (temperature * mixture.log()).float() + 0.03 * distance * randn()
    case = Case(student.to(dtype), teachers, target, temperature=temperature, hard_weight=0.0, reduction="sum")
    return with_other_labels(case) if two_labels else case


def with_other_labels(case: Case) -> Case:
    """A second label for each row, two columns after the first, with a share of three quarters."""
    second = (case.target + 2) % case.student.shape[-1]
    return case.with_(second_target=second, mix=torch.full(case.target.shape, 0.25))


def all_converged(
    N: int, C: int, K: int, dtype: torch.dtype, temperature: float, two_labels: bool = False
) -> Iterator[tuple[str, Case]]:
    """Every distance and kind, with peaked and with flat distributions."""
    for distance, peaked, kind in itertools.product(DISTANCES, (False, True), KINDS):
        kinds = {"distance": distance, "peaked": peaked, "kind": kind, "two_labels": two_labels}
        case = converged(N, C, K, dtype, temperature, **kinds)
        yield f"{kind}, {distance} apart, {'peaked' if peaked else 'flat'}", case


def assert_rounded_once(grad: Tensor, case: Case, what: str) -> None:
    """The error of a gradient is little more than that of rounding it to its dtype.

    Float32 arithmetic also rounds the terms whose difference the gradient is. Rounding each exponent to the unit u of
    float32 is an error of up to u times the exponent in its exponential.
    """
    R = truth(case).grad
    rounding = rms(R.to(grad.dtype).double() - R)
    logits = case.student.double()
    spread = float((logits.amax(1) - logits.gather(1, case.target.unsqueeze(1)).squeeze(1)).max())
    terms = case.temperature * rms((logits / case.temperature).softmax(1))
    arithmetic = 2 * torch.finfo(torch.float32).eps * (1 + spread / case.temperature) * terms
    error, allowed = rms(grad.double() - R), ROUNDINGS * rounding
    if grad.dtype == torch.float32:
        allowed += arithmetic
    assert error <= allowed, f"{what}: RMS error {error:.3e} > {allowed:.3e}, one rounding is {rounding:.3e}"


def labels_at(
    distances: Sequence[float], C: int, K: int, dtype: torch.dtype, temperature: float, seed: int = 0
) -> Case:
    """One row per distance of the label's logit from 0, in all streams; the other logits are near 0."""
    generator = torch.Generator().manual_seed(seed + C + K)
    N = len(distances)
    target = torch.randint(C, (N,), generator=generator)
    column, at = target.unsqueeze(1), torch.tensor(distances, dtype=torch.float32).unsqueeze(1)
    streams = [(2 * torch.randn(N, C, generator=generator)).scatter(1, column, at + k / 4) for k in range(K + 1)]
    student, *teachers = (z.to(dtype) for z in streams)
    return Case(student, tuple(teachers), target, temperature=temperature, reduction="sum")


def nearly_certain(height: float, C: int, K: int, dtype: torch.dtype, temperature: float) -> Case:
    """Forty rows whose label is `height` to `height` + 1 above 0 in every stream."""
    heights = height + torch.rand(40, generator=torch.Generator().manual_seed(0))
    return labels_at(heights.tolist(), C, K, dtype, temperature)


def assert_rows(case: Case, backend: str) -> None:
    """The tolerance rule for the statistics of all rows, and for the gradient of each row by itself.

    A row whose gradient is tiny keeps the rounding of the terms that it is the difference of: probabilities and 1.
    """
    actual, R, N = run_value_and_grad(case, backend), truth(case), naive(case)
    assert all(value.isfinite().all() for value in actual if value is not None)
    assert_result(actual._replace(grad=None), case, R, N)
    s, T = case.student.double(), case.temperature
    label = torch.nn.functional.one_hot(case.target, s.shape[1]).double()
    terms = T * (s / T).softmax(1) + s.softmax(1) + label
    for row, size in enumerate(terms):
        floor = 2 * torch.finfo(torch.float32).eps * rms(size)
        at_label = float(s[row, case.target[row]])
        assert_accurate(actual.grad[row], R.grad[row], N.grad[row], f"gradient with the label at {at_label}", floor)
