"""What every test measures with: cases, the float64 truth R, eager PyTorch N, and the one tolerance rule.

The formulas here are written from the paper a second time, not imported, so that a mistake in backends.reference shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from camkd_fast import camkd_loss, camkd_loss_and_grad

# Exponentials of it underflow to exactly 0, yet no product of it is NaN: what R and N see in place of -inf.
MASKED = -1e6


@dataclass(frozen=True, repr=False)
class Case:
    """Inputs and options of one evaluation."""

    student: Tensor
    teachers: tuple[Tensor, ...]
    target: Tensor
    temperature: float = 4.0
    hard_weight: float = 1.0
    soft_weight: float = 1.0
    weighting: str | Tensor = "confidence"
    reduction: str = "mean"
    ignore_index: int = -100
    num_items: float | Tensor | None = None

    def options(self) -> dict[str, Any]:
        names = ("temperature", "hard_weight", "soft_weight", "weighting", "reduction", "ignore_index", "num_items")
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        """Shapes rather than values: a failing case is reproduced from its seed."""
        tensors = [f"{z.dtype}{list(z.shape)} strides {z.stride()}" for z in (self.student, *self.teachers)]
        return f"Case({', '.join(tensors)}, target {self.target.flatten().tolist()[:8]}, {self.options()})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # what hypothesis asks for
        printer.text(repr(self))

    def with_(self, **changes: Any) -> Case:
        return replace(self, **changes)


class Result(NamedTuple):
    """Numbers of one evaluation; `grad` is d (loss * grad_output).sum() / d student."""

    loss: Tensor
    hard: Tensor
    soft: Tensor
    weights: Tensor
    teacher_ce: Tensor
    divergence: Tensor
    grad: Tensor
    grad_weighting: Tensor | None = None


def poisoned_slice(values: Tensor, pad: int, offset: int = 1) -> Tensor:
    """`values` (..., C) as a slice of a wider buffer that is NaN around it: a read outside shows in the result."""
    wide = torch.full((*values.shape[:-1], values.shape[-1] + pad + offset), float("nan"), dtype=values.dtype)
    view = wide[..., offset : offset + values.shape[-1]]
    view.copy_(values)
    return view


def make_case(
    N: int,
    C: int,
    K: int = 3,
    dtype: torch.dtype = torch.float32,
    *,
    peaked: bool = False,
    padded: bool = True,
    ignored: float = 0.0,
    teacher_dtypes: Sequence[torch.dtype] = (),
    seed: int = 0,
    lead: tuple[int, ...] | None = None,
    **options: Any,
) -> Case:
    """Random logits. `peaked`: ten times as wide, teachers mostly sure of the label and sometimes of another class."""
    generator = torch.Generator().manual_seed(1000003 * seed + 1009 * C + 31 * N + K)
    lead = (N,) if lead is None else lead
    target = torch.randint(C, (N,), generator=generator)
    scale = 10.0 if peaked else 1.0

    def logits(wrong: float) -> Tensor:
        values = torch.randn(N, C, generator=generator) * scale
        if peaked:
            other = torch.randint(C, (N,), generator=generator)
            top = torch.where(torch.rand(N, generator=generator) < wrong, other, target)
            values.scatter_add_(1, top.unsqueeze(1), torch.full((N, 1), 3.0 * scale))
        return values.view(*lead, C)

    dtypes = [teacher_dtypes[k % len(teacher_dtypes)] if teacher_dtypes else dtype for k in range(K)]
    tensors = [logits(0.3).to(dtype), *(logits(0.2 + 0.6 * k / K).to(dtypes[k]) for k in range(K))]
    if padded:
        tensors = [poisoned_slice(tensor, pad=3 + 2 * i, offset=1 + i % 3) for i, tensor in enumerate(tensors)]
    target = target.masked_fill(torch.rand(N, generator=generator) < ignored, options.get("ignore_index", -100))
    return Case(tensors[0], tuple(tensors[1:]), target.view(lead), **options)


def moved(z: Tensor, device: torch.device) -> Tensor:
    """`z` on another device in the same layout, with what surrounds it in its buffer."""
    whole = z if z._base is None else z._base
    return whole.detach().to(device).as_strided(z.shape, z.stride(), z.storage_offset())


def on(case: Case, device: torch.device) -> Case:
    """The same case on a device."""
    weighting = case.weighting
    return case.with_(
        student=moved(case.student, device),
        teachers=tuple(moved(z, device) for z in case.teachers),
        target=case.target.to(device),
        weighting=weighting.to(device) if isinstance(weighting, Tensor) else weighting,
    )


# --- R and N ---------------------------------------------------------------------------------------------------------


def per_row(case: Case, student: Tensor, teachers: Sequence[Tensor], weighting: str | Tensor) -> dict[str, Tensor]:
    """The paper's formulas for rows (N, C), none of them ignored, in the inputs' own dtype."""
    K, T, y = len(teachers), case.temperature, case.target.reshape(-1)
    label = torch.where(y == case.ignore_index, 0, y)
    log_q = F.log_softmax(student / T, dim=1)
    log_p = [F.log_softmax(z / T, dim=1) for z in teachers]
    divergence = torch.stack([(p.exp() * (p - log_q)).sum(1) for p in log_p])
    ce = torch.stack([F.cross_entropy(z, label, reduction="none") for z in teachers])
    if isinstance(weighting, Tensor):
        weights = weighting
    elif weighting == "uniform":
        weights = torch.full_like(ce, 1 / K)
    elif K == 1:
        weights = torch.ones_like(ce)
    elif weighting == "confidence":
        weights = (1 - ce.softmax(0)) / (K - 1)
    else:
        entropy = torch.stack([-(z.softmax(1) * z.log_softmax(1)).sum(1) for z in teachers])
        total = entropy.sum(0)
        weights = 1 - torch.where(total > 0, entropy / total, 1 / K)
    hard = F.cross_entropy(student, label, reduction="none")
    soft = T**2 * (weights * divergence).sum(0)
    loss = case.hard_weight * hard + case.soft_weight * soft
    return {"loss": loss, "hard": hard, "soft": soft, "weights": weights, "teacher_ce": ce, "divergence": divergence}


def eager(case: Case, dtype: torch.dtype, grad_output: Tensor | None = None) -> Result:
    """The formulas and their gradient by plain autograd with every operation in `dtype`: R for float64, N otherwise."""
    lead, C = case.target.shape, case.student.shape[-1]
    student = case.student.detach().to(dtype).reshape(-1, C).clamp(min=MASKED).requires_grad_()
    teachers = [z.to(dtype).reshape(-1, C).clamp(min=MASKED) for z in case.teachers]
    learned, weighting = None, case.weighting
    if isinstance(weighting, Tensor):
        learned = weighting.detach().to(dtype).requires_grad_()
        weighting = learned.reshape(len(teachers), -1).expand(len(teachers), student.shape[0])
    kept = (case.target != case.ignore_index).reshape(-1)
    numbers = {name: value.where(kept, 0.0) for name, value in per_row(case, student, teachers, weighting).items()}
    divisor: Any = 1
    if case.reduction == "mean":
        divisor = max(int(kept.sum()), 1) if case.num_items is None else float(case.num_items)
    for name in ("loss", "hard", "soft"):
        numbers[name] = numbers[name].view(lead) if case.reduction == "none" else (numbers[name] / divisor).sum()
    loss = numbers["loss"]
    cotangent = torch.ones_like(loss) if grad_output is None else grad_output.to(dtype)
    wanted = [student] if learned is None else [student, learned]
    grads = torch.autograd.grad(loss, wanted, cotangent, allow_unused=True)
    for name in ("weights", "teacher_ce", "divergence"):
        numbers[name] = numbers[name].view(len(teachers), *lead)
    detached = {name: value.detach() for name, value in numbers.items()}
    return Result(
        **detached, grad=grads[0].view(case.student.shape), grad_weighting=None if learned is None else grads[1]
    )


def truth(case: Case, grad_output: Tensor | None = None) -> Result:
    """R."""
    return eager(case, torch.float64, grad_output)


def naive(case: Case, grad_output: Tensor | None = None) -> Result:
    """N: plain PyTorch at the precision that every backend promises, float32 (float64 for float64 logits)."""
    return eager(case, torch.float64 if case.student.dtype == torch.float64 else torch.float32, grad_output)


# --- what is under test ----------------------------------------------------------------------------------------------


def fields(out: Any) -> list[Tensor]:
    """The numbers of an output by their public names."""
    return [getattr(out, name) for name in ("loss", "hard", "soft", "weights", "teacher_ce", "divergence")]


def run(case: Case, backend: str, grad_output: Tensor | None = None) -> Result:
    """camkd_loss and one backward."""
    student = case.student.detach().requires_grad_()
    options = case.options()
    learned = None
    if isinstance(case.weighting, Tensor):
        learned = options["weighting"] = case.weighting.detach().requires_grad_()
    out = camkd_loss(student, case.teachers, case.target, backend=backend, **options)
    out.loss.backward(grad_output if case.reduction == "none" or grad_output is not None else None)
    assert student.grad is not None
    return Result(
        *(x.detach() for x in fields(out)), grad=student.grad, grad_weighting=None if learned is None else learned.grad
    )


def run_value_and_grad(case: Case, backend: str, loss_scale: float | Tensor = 1.0) -> Result:
    """camkd_loss_and_grad."""
    out, grad = camkd_loss_and_grad(
        case.student, case.teachers, case.target, backend=backend, loss_scale=loss_scale, **case.options()
    )
    return Result(*fields(out), grad=grad)


# --- the tolerance rule ----------------------------------------------------------------------------------------------


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
