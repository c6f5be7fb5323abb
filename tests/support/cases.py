"""Cases: inputs and options of one evaluation, made at random or moved to a device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

# Replaces -inf in R and N: its exponential underflows to exactly 0, and no product with it is NaN.
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
    second_target: Tensor | None = None
    mix: Tensor | None = None
    divergence: str | tuple[str, float] = "forward_kl"
    scale_by_t2: bool = True
    z_loss_weight: float = 0.0
    student_logit_scale: float = 1.0
    student_softcap: float | None = None
    teacher_logit_scales: Sequence[float] | None = None
    teacher_softcaps: Sequence[float | None] | None = None
    entropy: bool = False

    def options(self) -> dict[str, Any]:
        """The keywords of camkd_loss."""
        return {field.name: getattr(self, field.name) for field in fields(self)[3:]}

    def logit_map(self, k: int | None) -> tuple[float, float | None]:
        """Scale and softcap of teacher k; of the student without k."""
        if k is None:
            return self.student_logit_scale, self.student_softcap
        scales, softcaps = self.teacher_logit_scales, self.teacher_softcaps
        return 1.0 if scales is None else scales[k], None if softcaps is None else softcaps[k]

    def __repr__(self) -> str:
        """Shapes instead of values: a failing case is reproduced from its seed."""
        tensors = [f"{z.dtype}{list(z.shape)} strides {z.stride()}" for z in (self.student, *self.teachers)]
        return f"Case({', '.join(tensors)}, target {self.target.flatten().tolist()[:8]}, {self.options()})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # used by hypothesis
        printer.text(repr(self))

    def with_(self, **changes: Any) -> Case:
        return replace(self, **changes)


def second_labels(target: Tensor, allowed: Tensor, ignore_index: int, generator: torch.Generator) -> dict[str, Tensor]:
    """`second_target` and `mix` for labels (...), of which the second ones are `allowed`, drawn at random.

    Among the rows that count, a tenth each have a share of 0, a share of 1 and twice the same label. Ignored rows hold
    what nobody may read.
    """
    shape = target.shape
    second = allowed[torch.randint(len(allowed), shape, generator=generator)]
    mix, kind = torch.rand(shape, generator=generator), torch.rand(shape, generator=generator)
    mix = mix.masked_fill(kind < 0.1, 0.0).masked_fill((kind >= 0.1) & (kind < 0.2), 1.0)
    second = second.where((kind < 0.9) & (second != ignore_index), target)
    ignored = target == ignore_index
    return {"second_target": second.masked_fill(ignored, -7), "mix": mix.masked_fill(ignored, float("nan"))}


def poisoned_slice(values: Tensor, pad: int, offset: int = 1) -> Tensor:
    """`values` (..., C) as a slice of a wider buffer full of NaN: a read outside the slice shows in the result."""
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
    two_labels: bool = False,
    **options: Any,
) -> Case:
    """Random logits. With `peaked` they are ten times as wide, and teachers mostly certain, not always of the label.

    Args:
        padded: logits are slices of wider NaN buffers, with different strides.
        ignored: probability that a row is ignored.
        lead: leading dimensions, with N elements; (N,) by default.
        two_labels: rows have a second label; see `second_labels`.
    """
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
    if two_labels:
        options |= second_labels(target.view(lead), torch.arange(C), options.get("ignore_index", -100), generator)
    return Case(tensors[0], tuple(tensors[1:]), target.view(lead), **options)


def nearly_no_weight() -> Case:
    """The last teacher has a weight of about 1e-9, and an infinite divergence where the student masks its class."""
    case = make_case(4, 40, 3, padded=False)
    student, teachers = case.student.clone(), [z.clone() for z in case.teachers]
    target = torch.full((4,), 5)
    student[:2, 7] = teachers[0][:, 7] = teachers[1][:, 7] = -math.inf
    teachers[2][:, 7] = teachers[2][:, 5] + 26.0
    return case.with_(student=student, teachers=tuple(teachers), target=target, reduction="none")


def moved(z: Tensor, device: torch.device) -> Tensor:
    """`z` on another device in the same layout, with its whole buffer."""
    whole = z if z._base is None else z._base
    return whole.detach().to(device).as_strided(z.shape, z.stride(), z.storage_offset())


def on(case: Case, device: torch.device) -> Case:
    """The same case on another device."""
    others = {name: getattr(case, name) for name in ("weighting", "second_target", "mix")}
    return case.with_(
        student=moved(case.student, device),
        teachers=tuple(moved(z, device) for z in case.teachers),
        target=case.target.to(device),
        **{name: value.to(device) if isinstance(value, Tensor) else value for name, value in others.items()},
    )
