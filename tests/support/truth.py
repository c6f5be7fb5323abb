"""The paper's formulas in eager PyTorch: R in float64, N in float32.

They are written from the paper a second time, not imported, so that a mistake in the reference backend shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.cases import MASKED, Case
from tests.support.evaluate import Result
from tests.support.tolerance import logit_maps


def per_row(case: Case, student: Tensor, teachers: Sequence[Tensor], weighting: str | Tensor) -> dict[str, Tensor]:
    """The paper's formulas for rows (N, C) in the dtype of the inputs; ignored rows are not treated."""
    K, T, y = len(teachers), case.temperature, case.target.reshape(-1)
    student, *teachers = (_logits(x, *of) for x, of in zip((student, *teachers), logit_maps(case), strict=True))
    ignored = y == case.ignore_index
    label = torch.where(ignored, 0, y)

    def cross_entropy(z: Tensor) -> Tensor:
        first = F.cross_entropy(z, label, reduction="none")
        if case.second_target is None:
            return first
        share = torch.where(ignored, 1.0, case.mix.reshape(-1)).to(z.dtype)
        second = torch.where(ignored, 0, case.second_target.reshape(-1))
        return share * first + (1 - share) * F.cross_entropy(z, second, reduction="none")

    log_q = F.log_softmax(student / T, dim=1)
    log_p = [F.log_softmax(z / T, dim=1) for z in teachers]
    divergence = torch.stack([_divergence(p, log_q, case.divergence) for p in log_p])
    ce = torch.stack([cross_entropy(z) for z in teachers])
    if isinstance(weighting, Tensor):
        weights = weighting
    elif weighting == "uniform":
        weights = torch.full_like(ce, 1 / K)
    elif K == 1:
        weights = torch.ones_like(ce)
    elif weighting == "min_ce":
        best = [min(range(K), key=column.__getitem__) for column in ce.t().tolist()]
        weights = F.one_hot(torch.tensor(best, dtype=torch.int64, device=ce.device), K).t().to(ce)
    elif weighting == "confidence":
        weights = (1 - ce.softmax(0)) / (K - 1)
    else:
        entropy = torch.stack([-(z.softmax(1) * z.log_softmax(1)).sum(1) for z in teachers])
        total = entropy.sum(0)
        weights = 1 - torch.where(total > 0, entropy / total, 1 / K)
    hard = cross_entropy(student)
    soft = (T**2 if case.scale_by_t2 else 1) * (weights * divergence).sum(0)
    loss = case.hard_weight * hard + case.soft_weight * soft + case.z_loss_weight * student.logsumexp(1) ** 2
    return {"loss": loss, "hard": hard, "soft": soft, "weights": weights, "teacher_ce": ce, "divergence": divergence}


def entropy(case: Case, dtype: torch.dtype) -> Tensor:
    """The student's entropies (...) at temperature T, 0 on ignored rows."""
    x = case.student.to(dtype).clamp(min=MASKED)
    log_q = F.log_softmax(_logits(x, *case.logit_map(None)) / case.temperature, dim=-1)
    return -(log_q.exp() * log_q).sum(-1).where(case.target != case.ignore_index, 0.0)


def _logits(x: Tensor, scale: float, softcap: float | None) -> Tensor:
    return x * scale if softcap is None else softcap * torch.tanh(x * scale / softcap)


def _divergence(log_p: Tensor, log_q: Tensor, divergence: str | tuple[str, float]) -> Tensor:
    def kl(a: Tensor, b: Tensor) -> Tensor:
        return F.kl_div(b, a, reduction="none", log_target=True).sum(1)

    kind, share = divergence if isinstance(divergence, tuple) else (divergence, 0.0)
    if kind == "forward_kl" or (share == 0.0 and kind != "reverse_kl"):
        return kl(log_p, log_q)
    if kind == "reverse_kl" or share == 1.0:
        return kl(log_q, log_p)
    log_m = torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))
    return kl(log_p, log_m) if kind == "skew" else share * kl(log_p, log_m) + (1 - share) * kl(log_q, log_m)


def eager(case: Case, dtype: torch.dtype, grad_output: Tensor | None = None) -> Result:
    """The formulas and their gradient by autograd, every operation in `dtype`."""
    lead, C = case.target.shape, case.student.shape[-1]
    student = case.student.detach().to(dtype).reshape(-1, C).clamp(min=MASKED).requires_grad_()
    teachers = [z.to(dtype).reshape(-1, C).clamp(min=MASKED) for z in case.teachers]
    learned, weighting = None, case.weighting
    if isinstance(weighting, Tensor):
        learned = weighting.detach().to(dtype).requires_grad_()
        weighting = learned.reshape(len(teachers), -1).expand(len(teachers), student.shape[0])
    kept = (case.target != case.ignore_index).reshape(-1)
    results = {name: value.where(kept, 0.0) for name, value in per_row(case, student, teachers, weighting).items()}
    divisor: Any = 1
    if case.reduction == "mean":
        divisor = max(int(kept.sum()), 1) if case.num_items is None else float(case.num_items)
    for name in ("loss", "hard", "soft"):
        results[name] = results[name].view(lead) if case.reduction == "none" else (results[name] / divisor).sum()
    loss = results["loss"]
    cotangent = torch.ones_like(loss) if grad_output is None else grad_output.to(dtype)
    inputs = [student] if learned is None else [student, learned]
    grads = torch.autograd.grad(loss, inputs, cotangent, allow_unused=True)
    for name in ("weights", "teacher_ce", "divergence"):
        results[name] = results[name].view(len(teachers), *lead)
    detached = {name: value.detach() for name, value in results.items()}
    return Result(
        **detached, grad=grads[0].view(case.student.shape), grad_weighting=None if learned is None else grads[1]
    )


def truth(case: Case, grad_output: Tensor | None = None) -> Result:
    """R: the formulas in float64."""
    return eager(case, torch.float64, grad_output)


def naive(case: Case, grad_output: Tensor | None = None) -> Result:
    """N: eager PyTorch at the precision that every backend promises, float32 (float64 for float64 logits)."""
    return eager(case, torch.float64 if case.student.dtype == torch.float64 else torch.float32, grad_output)
