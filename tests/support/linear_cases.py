"""Cases of the linear loss, and its formulas with all logits at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from camkd_fast import camkd_linear_loss
from camkd_fast.losses.linear import LinearLossOutput
from tests.support.cases import Case
from tests.support.tolerance import assert_accurate
from tests.support.truth import entropy, per_row

MAPS: dict[str, Any] = {
    "student_logit_scale": 0.5, "student_softcap": 5.0, "teacher_logit_scales": (2.0, 1.0),
    "teacher_softcaps": (None, 4.0),
}  # fmt: skip


@dataclass(frozen=True, repr=False)
class LinearCase:
    """Hidden states, heads and biases of student and K teachers, labels, and keywords of camkd_linear_loss."""

    hidden: Tensor
    head: Tensor
    bias: Tensor | None
    teacher_hidden: tuple[Tensor, ...]
    teacher_heads: tuple[Tensor, ...]
    teacher_biases: tuple[Tensor | None, ...] | None
    target: Tensor
    options: dict[str, Any]

    def __repr__(self) -> str:
        shapes = [list(x.shape) for x in (self.hidden, self.head, *self.teacher_hidden, *self.teacher_heads)]
        return f"LinearCase({self.hidden.dtype}, {shapes}, {self.target.flatten().tolist()[:8]}, {self.options})"

    def with_(self, **changes: Any) -> LinearCase:
        """Other tensors, or other keywords."""
        own = {name: value for name, value in changes.items() if name in self.__dataclass_fields__}
        others = {name: value for name, value in changes.items() if name not in own}
        return replace(self, **{"options": {**self.options, **others}, **own})

    def to(self, dtype: torch.dtype) -> LinearCase:
        """The same values in another dtype."""

        def cast(x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(map(cast, x))
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        names = [name for name in self.__dataclass_fields__ if name not in ("target", "options")]
        return replace(
            self,
            options={name: cast(value) for name, value in self.options.items()},
            **{name: cast(getattr(self, name)) for name in names},
        )


class LinearResult(NamedTuple):
    """The numbers of one evaluation; gradients are those of sum(loss * grad_output)."""

    loss: Tensor
    hard: Tensor | None
    soft: Tensor
    weights: Tensor
    teacher_ce: Tensor | None
    divergence: Tensor
    entropy: Tensor | None
    grad_hidden: Tensor
    grad_head: Tensor
    grad_bias: Tensor | None


def make_linear_case(
    N: int = 37,
    C: int = 50,
    widths: tuple[int, ...] = (8, 12, 6),
    dtype: torch.dtype = torch.float32,
    *,
    ignored: float = 0.0,
    biased: bool = True,
    lead: tuple[int, ...] | None = None,
    spread: float = 3.0,
    seed: int = 0,
    **options: Any,
) -> LinearCase:
    """Random models.

    Args:
        widths: of the hidden states: the student's, then the teachers'.
        ignored: probability that a row is ignored.
        lead: leading dimensions, with N elements.
        spread: standard deviation of the logits, about.
    """
    generator = torch.Generator().manual_seed(7919 * seed + 31 * N + C)
    lead = (N,) if lead is None else lead

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    sides = [
        (normal(*lead, H).to(dtype), (spread / H**0.5 * normal(C, H)).to(dtype), normal(C).to(dtype)) for H in widths
    ]
    target = torch.randint(C, lead, generator=generator)
    target = target.masked_fill(torch.rand(lead, generator=generator) < ignored, options.get("ignore_index", -100))
    hidden, heads, biases = zip(*sides, strict=True)
    return LinearCase(
        *(hidden[0], heads[0], biases[0] if biased else None),
        *(hidden[1:], heads[1:], (*biases[1:-1], None) if biased else None, target, options),
    )


def run(case: LinearCase, grad_output: Tensor | None = None, **keywords: Any) -> LinearResult:
    """camkd_linear_loss and one backward."""
    parameters = [
        None if x is None else x.detach().clone().requires_grad_() for x in (case.hidden, case.head, case.bias)
    ]
    out = evaluate(case, *parameters, **keywords)
    wanted = [x for x in parameters if x is not None]
    found = list(torch.autograd.grad(out.loss, wanted, grad_output))
    return LinearResult(*(x if x is None else x.detach() for x in out[:7]), *found, *[None] * (3 - len(found)))


def evaluate(
    case: LinearCase, hidden: Tensor | None, head: Tensor | None, bias: Tensor | None, **keywords: Any
) -> LinearLossOutput:
    assert hidden is not None and head is not None
    return camkd_linear_loss(
        *(hidden, head, case.teacher_hidden, case.teacher_heads, case.target),
        student_bias=bias,
        teacher_biases=case.teacher_biases,
        **{"entropy": True, **case.options, **keywords},
    )


def unfused(case: LinearCase, dtype: torch.dtype, grad_output: Tensor | None = None) -> LinearResult:
    """The formulas with all logits in `dtype`, and gradients by autograd: R in float64, N in float32."""
    wide = case.to(dtype)
    parameters = [None if x is None else x.clone().requires_grad_() for x in (wide.hidden, wide.head, wide.bias)]
    hidden, head, bias = parameters
    assert hidden is not None and head is not None
    lead, C, K = case.target.shape, case.options.get("vocab_size") or head.shape[0], len(case.teacher_hidden)
    options = {"temperature": 1.0, "hard_weight": 0.0, "soft_weight": 1.0, **wide.options}
    shift, num_items = options.pop("shift", False), options.get("num_items")
    for name in ("vocab_size", "chunk_rows", "max_chunk_bytes", "logits_dtype", "backend", "num_valid"):
        options.pop(name, None)

    def logits(h: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        z = h.reshape(-1, h.shape[-1]) @ w[:C].t()
        return z if b is None else z + b[:C]

    biases = wide.teacher_biases or (None,) * K
    teachers = [logits(*of) for of in zip(wide.teacher_hidden, wide.teacher_heads, biases, strict=True)]
    target = case.target
    is_mask = target.dtype == torch.bool
    ignore_index = options.get("ignore_index", -100)
    if is_mask:
        target = torch.where(target, 0, ignore_index)
    if shift:
        target = torch.cat([target[..., 1:], torch.full_like(target[..., :1], ignore_index)], -1)
    kept = (target != ignore_index).reshape(-1)
    weighting = options.get("weighting", "confidence")
    of_zero = torch.zeros(K, int(kept.numel()), dtype=torch.bool)
    if isinstance(weighting, Tensor):
        if shift and weighting.dim() > 1:
            weighting = torch.cat([weighting, torch.zeros_like(weighting[..., :1])], -1)
        weighting = weighting.reshape(K, -1).expand(K, kept.numel())
        of_zero = weighting == 0
        teachers = [z.masked_fill((w == 0).unsqueeze(-1), 0.0) for z, w in zip(teachers, weighting, strict=True)]
    z = logits(hidden, head, bias)
    # Ignored rows may hold anything.
    z = z.masked_fill(~kept.unsqueeze(-1), 0.0)
    teachers = [t.masked_fill(~kept.unsqueeze(-1), 0.0) for t in teachers]
    options.pop("weighting", None)
    flat = Case(z, tuple(teachers), target.reshape(-1), **options)
    found = {name: value.where(kept, 0.0) for name, value in per_row(flat, z, teachers, weighting).items()}
    for name in ("teacher_ce", "divergence"):
        found[name] = found[name].masked_fill(of_zero, 0.0)
    found["entropy"] = entropy(flat.with_(student=z.detach()), dtype)
    reduction = options.get("reduction", "mean")
    divisor = max(int(kept.sum()), 1) if num_items is None else float(num_items)

    def shaped(rows: Tensor) -> Tensor:
        rows = rows.view(*rows.shape[:-1], *lead)
        return rows[..., :-1] if shift else rows

    for name, rows in found.items():
        if name in ("loss", "hard", "soft") and reduction != "none":
            found[name] = rows.sum() / (divisor if reduction == "mean" else 1)
        else:
            found[name] = shaped(rows)
    wanted = [x for x in parameters if x is not None]
    grads = list(torch.autograd.grad(found["loss"], wanted, None if grad_output is None else grad_output.to(dtype)))
    if is_mask:
        found["hard"] = found["teacher_ce"] = None
    values = [found[name] if found[name] is None else found[name].detach() for name in LinearResult._fields[:7]]
    return LinearResult(*values, *grads, *[None] * (3 - len(grads)))


def assert_rule(case: LinearCase, grad_output: Tensor | None = None, **keywords: Any) -> LinearResult:
    """Every number and gradient within the tolerance rule of the formulas in float64."""
    R, N = (unfused(case, dtype, grad_output) for dtype in (torch.float64, torch.float32))
    ours = run(case, grad_output, **keywords)
    for name, a, r, n in zip(LinearResult._fields, ours, R, N, strict=True):
        if r is None:
            assert a is None
            continue
        # Sums of N products of up to `widest` terms are in another order than N's.
        floor = 8 * torch.finfo(torch.float32).eps * (1 + float(r.abs().max()) if r.numel() else 0.0)
        assert_accurate(a, r, n, name, 0.0 if name.startswith("grad") and r.numel() > 100 and r.any() else floor)
    return ours
