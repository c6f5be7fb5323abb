"""The specification of every op in PyTorch, and the fallback backend.

Source: Zhang, Chen, Wang, "Confidence-Aware Multi-Teacher Knowledge Distillation", ICASSP 2022 (arXiv 2201.00007).

Notation. One row (sample) has student logits s and teacher logits z_1..z_K, all of width C, a label y, a temperature T.

    p_k  = softmax(z_k / T)                    q = softmax(s / T)
    CE_k = -log softmax(z_k)[y]                teacher cross-entropy, always at temperature 1        (eq. 2)
    H_k  = -sum_c softmax(z_k)_c log softmax(z_k)_c
    w_k  = (1 - softmax_k(CE_k)) / (K - 1)     confidence weight, the softmax running over K          (eq. 3)
    KL_k = sum_c p_kc (log p_kc - log q_c)     or another divergence D_k, see `divergences`
    hard = -log softmax(s)[y]                  soft = T^2 sum_k w_k KL_k                              (eq. 4)
    loss = hard_weight * hard + soft_weight * soft

Gradient. d KL_k / ds = (q - p_k) / T, so with W = sum_k w_k one mixture is enough for any K:

    d loss / ds  = soft_weight * T * (W q - sum_k w_k p_k) + hard_weight * (softmax(s) - onehot(y))   (grad_student)
    d loss / dw_k = soft_weight * T^2 * KL_k

Beyond the paper (`losses.formula`), with lse = log sum_c e^{s_c}:

    weights "min_ce"      1 for the teacher with the lowest CE_k, the first of several, and 0 for the others
    not scale_by_t2       soft = sum_k w_k KL_k
    z_loss_weight         loss += z_loss_weight * lse^2, gradient 2 * z_loss_weight * lse * softmax(s)
    scales and softcaps   a logit is z = cap * tanh(scale * x / cap), with dz / dx = scale * (1 - (z / cap)^2)
    entropy               -sum_c q_c log q_c of the student, without a gradient

Two labels. A row may have a second label y2, and in `mix` the share of y. Then CE_k and hard are

    mix * (-log softmax(.)[y]) + (1 - mix) * (-log softmax(.)[y2])

with the gradient softmax(.) - mix * onehot(y) - (1 - mix) * onehot(y2); everything else is as above.

Feature loss (eq. 6): error_k = mean over the M values of one sample of (F_k - r_k)^2, loss = sum_k w_k error_k.
The weights are known before the maps are read, so error and gradient need one pass over r_k and F_k:

    d loss / dr_k = w_k * 2 (r_k - F_k) / M                 d loss / dw_k = error_k

Conventions at the edges, which every backend shares:

    -inf logits           p_kc = 0 contributes 0 whatever q_c is; p_kc > 0 with q_c = 0 makes KL_k = +inf
    weight 0              a term of weight 0 contributes 0, even when it is infinite; to the feature loss, also when NaN
    infinite CE_k         those teachers share the softmax mass equally (one of them: weight 0; all: uniform)
    K = 1                 w = 1 for "confidence" and "entropy"
    all H_k = 0           each ratio H_k / sum_j H_j is 1/K
    target = ignore_index every output of that row is exactly 0, even if its logits are NaN
    label outside [0, C)  loss, hard, CE_k and gradient of that row are NaN (refused beforehand for CPU tensors)
    invalid second label  the same; so are an ignore_index in y2 only, and a `mix` outside [0, 1]
    share 0, or y2 = y    the row has the one label that is left, whatever its logits at the other one are

Layouts: logits are (N, C) or, for rows that no single stride can describe, (B, S, C) with N = B * S; target is (N,)
int64. Arithmetic is float64 for float64 logits and float32 for everything else. Every backend is tested
against this file in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses.divergence import FORWARD_KL
from ..losses.formula import Formula, LogitMap
from .contract import PER_TEACHER, FeatureLossResult, RowLossResult, SecondLabels
from .divergences import divergence_gradient, divergence_of
from .feature_maps import gradient_strides, in_memory_order, new_gradients, sample_size
from .labels import labels_of


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for every narrower type."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows(logits: Tensor) -> Tensor:
    flat = logits.reshape(-1, logits.shape[-1])
    return flat.to(accumulation_dtype(logits.dtype))


def logits_of(tensor: Tensor, logit_map: LogitMap, dtype: torch.dtype | None = None) -> Tensor:
    """Logits (N, C) from what a head has computed, in the accumulation dtype or the student's."""
    rows = _rows(tensor)
    return _mapped(rows if dtype is None else rows.to(dtype), logit_map)


def _mapped(rows: Tensor, logit_map: LogitMap) -> Tensor:
    scale, softcap = logit_map
    rows = rows if scale == 1.0 else scale * rows
    return rows if softcap == 0.0 else softcap * (rows / softcap).tanh()


def map_gradient(logits: Tensor, logit_map: LogitMap, gradient: Tensor) -> Tensor:
    """The gradient by what a head has computed, from that by the logits."""
    scale, softcap = logit_map
    gradient = gradient if scale == 1.0 else scale * gradient
    return gradient if softcap == 0.0 else gradient * (1.0 - (logits / softcap).square())


def softmax_over_teachers(ce: Tensor) -> Tensor:
    """softmax over dim 0 of (K, N), infinite entries sharing the mass equally. Differentiable."""
    infinite = ce.detach().isposinf()
    top = ce.detach().amax(0, keepdim=True)
    gap = ce.masked_fill(infinite, 0.0) - top.masked_fill(top.isposinf(), 0.0)
    return gap.masked_fill(top.isposinf() & ~infinite, float("-inf")).softmax(0)


def _of_the_others(shares: Tensor) -> Tensor:
    """1 - shares (K, N), which are those of a whole, as the sum of the other shares: for a teacher that has nearly all,
    the difference would be 0 in float32, and a weight of 0 also removes an infinite divergence."""
    return torch.stack([torch.cat([shares[:k], shares[k + 1 :]]).sum(0) for k in range(shares.shape[0])])


def weights_from_ce(ce: Tensor) -> Tensor:
    """Confidence weights (K, N) = (1 - softmax_k(CE)) / (K - 1) from cross-entropies (K, N): eq. 3. Differentiable."""
    K = ce.shape[0]
    return torch.ones_like(ce) if K == 1 else _of_the_others(softmax_over_teachers(ce)) / (K - 1)


def weights_from_entropy(entropy: Tensor) -> Tensor:
    """EBKD weights (K, N) = 1 - H_k / sum_j H_j; they sum to K - 1 (K = 1: to 1)."""
    K = entropy.shape[0]
    if K == 1:
        return torch.ones_like(entropy)
    total = entropy.sum(0, keepdim=True)
    ratio = entropy / total.masked_fill(total <= 0, 1.0)
    return _of_the_others(ratio.masked_fill(total <= 0, 1.0 / K))


def weights_of_lowest(ce: Tensor) -> Tensor:
    """Weights (K, N) of "min_ce": 1 for the first of the lowest cross-entropies; NaN where one of them is."""
    lowest = ce == ce.amin(0, keepdim=True)
    first = (lowest & (lowest.cumsum(0) == 1)).to(ce.dtype)
    return first.masked_fill(ce.isnan().any(0), float("nan"))


def _weighted_sum(weights: Tensor, terms: Tensor) -> Tensor:
    """sum_k w_k term_k; its derivative by a weight of 0 is the term, unless that is infinite."""
    return (weights * _counted(weights, terms)).sum(0)


def _counted(weights: Tensor, terms: Tensor) -> Tensor:
    """The terms (K, N), and 0 for those that count for nothing because their weight is 0."""
    return terms.masked_fill((weights == 0) & ~terms.isfinite(), 0.0)


def weight_gradient(rows: RowLossResult, formula: Formula, factor: Tensor) -> Tensor:
    """d loss / d w_k (K, N) of given weights, from the numbers of the rows, times a factor: that of `loss_terms`."""
    if formula.soft_weight == 0.0:
        return torch.zeros_like(rows.divergence)
    return scaled(_counted(rows.weights, rows.divergence), factor * formula.soft_scale())


def loss_terms(
    student: Tensor,
    teachers: Sequence[Tensor],
    target: Tensor,
    formula: Formula,
    second: SecondLabels | None = None,
) -> RowLossResult:
    """The formulas above as a differentiable expression, without the closed-form gradient. Ignored rows give 0."""
    temperature = formula.temperature
    labels = labels_of(target, second, student.shape[-1], formula.ignore_index)
    ignored = labels.ignored
    # Ignored rows are replaced before any arithmetic, so that their NaN cannot reach a sum or a gradient.
    s = _mapped(_rows(student).masked_fill(ignored.unsqueeze(-1), 0.0), formula.student_map())
    zs = [
        _mapped(_rows(z).to(s.dtype).masked_fill(ignored.unsqueeze(-1), 0.0), formula.teacher_map(k))
        for k, z in enumerate(teachers)
    ]

    log_q = F.log_softmax(s / temperature, dim=-1)
    kind = formula.divergence_kind()
    divergence = torch.stack([divergence_of(F.log_softmax(z / temperature, dim=-1), log_q, kind) for z in zs])
    teacher_log_prob = [F.log_softmax(z, dim=-1) for z in zs]
    teacher_ce = torch.stack([-labels.pick(log_prob) for log_prob in teacher_log_prob])
    hard = -labels.pick(F.log_softmax(s, dim=-1))
    teacher_entropy = lse = entropy = None
    if formula.weighting_name() == "entropy":
        teacher_entropy = torch.stack([torch.special.entr(lp.exp()).sum(-1) for lp in teacher_log_prob])
    if formula.z_loss_weight != 0.0:
        lse = s.logsumexp(-1)
    if formula.entropy:
        entropy = torch.special.entr(log_q.exp()).sum(-1).detach()
    terms = RowTerms(divergence, teacher_ce, teacher_entropy, hard, lse, entropy)
    return RowLossResult(row_stats_of(terms, formula, labels.valid, ignored), None)


class RowTerms(NamedTuple):
    """What the numbers of a row are made of."""

    divergence: Tensor  # (K, N)
    teacher_ce: Tensor  # (K, N)
    teacher_entropy: Tensor | None  # (K, N), for the weights "entropy"
    hard: Tensor  # (N,)
    lse: Tensor | None  # (N,): the student's at T = 1, for the z-loss
    entropy: Tensor | None  # (N,): the student's at T, if the formula asks for it


def row_stats_of(terms: RowTerms, formula: Formula, valid: Tensor, ignored: Tensor) -> Tensor:
    """`RowLossResult.row_stats`, given which rows have valid labels and which are ignored. Differentiable."""
    divergence, teacher_ce, teacher_entropy, hard, lse, entropy = terms
    temperature, weighting = formula.temperature, formula.weighting
    if isinstance(weighting, Tensor):
        weights = weighting.to(hard.dtype)
    elif weighting == "confidence":
        weights = weights_from_ce(teacher_ce)
    elif weighting == "entropy":
        assert teacher_entropy is not None, "weights by entropies without them"
        weights = weights_from_entropy(teacher_entropy)
    elif weighting == "min_ce":
        weights = weights_of_lowest(teacher_ce)
    else:
        weights = torch.full_like(teacher_ce, 1.0 / len(teacher_ce))

    soft = _weighted_sum(weights, divergence)
    soft = temperature**2 * soft if formula.scale_by_t2 else soft
    # Filled on the device: a copy of host numbers would wait for it, and could not be captured in a CUDA graph.
    coefficients = torch.stack([torch.full_like(hard, weight) for weight in (formula.hard_weight, formula.soft_weight)])
    if formula.soft_weight == 0.0:  # or the derivatives of teachers that are NaN would be 0 times NaN
        soft, divergence = soft.detach(), divergence.detach()
    loss = _weighted_sum(coefficients, torch.stack([hard, soft]))
    if formula.z_loss_weight != 0.0:
        assert lse is not None, "a z-loss without log-sum-exps"
        loss = loss + formula.z_loss_weight * lse.square()
    # A label outside [0, C) has no loss at all, not even where its coefficient is 0.
    loss = loss.masked_fill(~valid, float("nan"))
    rows = [torch.stack([loss, hard, soft]), divergence, teacher_ce, weights]
    if formula.entropy:
        assert entropy is not None, "no entropies"
        rows.append(entropy.unsqueeze(0))
    return torch.cat(rows).masked_fill(ignored, 0.0)


def grad_student(
    student: Tensor,
    teachers: Sequence[Tensor],
    target: Tensor,
    formula: Formula,
    weights: Tensor,
    second: SecondLabels | None = None,
) -> Tensor:
    """d loss / d student in closed form, (N, C) in the accumulation dtype, given weights (K, N)."""
    labels = labels_of(target, second, student.shape[-1], formula.ignore_index)
    s = logits_of(student, formula.student_map())
    out = formula.soft_grad_scale() * _soft_gradient(s, teachers, formula, weights.to(s.dtype).unsqueeze(-1))
    out = out + formula.hard_weight * (s.softmax(-1) - labels.onehot(s))
    if formula.z_loss_weight != 0.0:
        out = out + 2.0 * formula.z_loss_weight * s.logsumexp(-1, keepdim=True) * s.softmax(-1)
    out = map_gradient(s, formula.student_map(), out)
    out = out.masked_fill(~labels.valid.unsqueeze(-1), float("nan"))
    return out.masked_fill(labels.ignored.unsqueeze(-1), 0.0)


def _soft_gradient(s: Tensor, teachers: Sequence[Tensor], formula: Formula, w: Tensor) -> Tensor:
    """T d/ds of sum_k w_k D_k for logits s (N, C) and weights (K, N, 1); 0 if nobody asks for it."""
    T, kind = formula.temperature, formula.divergence_kind()
    if formula.soft_weight == 0.0:  # whatever the teachers are
        return torch.zeros_like(s)
    zs = (logits_of(z, formula.teacher_map(k), s.dtype) / T for k, z in enumerate(teachers))
    if kind == FORWARD_KL:
        return w.sum(0) * (s / T).softmax(-1) - weighted_sum_of(w, (z.softmax(-1) for z in zs))
    log_q = (s / T).log_softmax(-1)
    return weighted_sum_of(w, (divergence_gradient(z.log_softmax(-1), log_q, kind) for z in zs))


def weighted_sum_of(weights: Tensor, terms: Iterable[Tensor]) -> Tensor:
    """sum_k w_k term_k of K terms (N, C) and weights (K, N, 1); a term of weight 0 is 0 even where it is not finite."""
    first, *others = ((w * term).masked_fill(w == 0, 0.0) for w, term in zip(weights.unbind(), terms, strict=True))
    return sum(others, start=first)


@torch.no_grad()
def row_loss(
    student: Tensor,
    teachers: Sequence[Tensor],
    target: Tensor,
    formula: Formula,
    *,
    needs_grad: bool,
    grad_scale: float | Tensor = 1.0,
    mean: bool = False,
    total_scale: float | None = None,
    second: SecondLabels | None = None,
    out: Tensor | None = None,
) -> RowLossResult:
    """See `contract.Backend`."""
    result = loss_terms(student, teachers, target, formula, second)
    scales = [grad_scale]
    if mean:
        valid = (target != formula.ignore_index).sum().clamp(min=1)
        inverse = valid.to(result.row_stats.dtype).reciprocal().reshape(1)
        loss, hard, soft = (result.row_stats[:PER_TEACHER].sum(1) * inverse).unbind()
        result = replace(result, means=(loss.clone(), torch.stack([hard, soft, inverse[0]])))
        scales.append(inverse)
    if not needs_grad:
        return result
    gradient = grad_student(student, teachers, target, formula, result.weights, second)
    for scale in scales:
        gradient = gradient * scale
    return replace(result, grad_student=gradient.to(student.dtype) if out is None else out.copy_(gradient))


def scale_rows(grad: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    """See `contract.Backend`."""
    return out.copy_(scaled(grad, factor.unsqueeze(-1)))


def scaled(values: Tensor, factor: Tensor) -> Tensor:
    """values * factor in the factor's dtype. What is 0, as in ignored rows, stays 0 whatever the factor is."""
    wide = values.to(factor.dtype)
    return (wide * factor).masked_fill(wide == 0, 0.0)


def confidence_forward(
    logits: Sequence[Tensor],
    target: Tensor,
    ignore_index: int,
    inverse_valid: Tensor | None = None,
    second: SecondLabels | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Confidence weights w (K, N), teacher cross-entropies CE (K, N) and log-sum-exps at T = 1 (K, N)."""
    labels = labels_of(target, second, logits[0].shape[-1], ignore_index)
    if inverse_valid is not None:
        inverse_valid.copy_((~labels.ignored).sum().clamp(min=1).to(inverse_valid.dtype).reciprocal())
    lse, ce = [], []
    for z in logits:
        rows = _rows(z).masked_fill(labels.ignored.unsqueeze(-1), 0.0)
        lse.append(rows.logsumexp(-1))
        ce.append(-labels.pick(rows.log_softmax(-1)))
    teacher_ce = torch.stack(ce)
    results = weights_from_ce(teacher_ce), teacher_ce, torch.stack(lse)
    weights, teacher_ce, lse_rows = (rows.masked_fill(labels.ignored, 0.0) for rows in results)
    return weights, teacher_ce, lse_rows


def confidence_backward(
    logits: Sequence[Tensor],
    target: Tensor,
    lse: Tensor,
    grad_ce: Tensor,
    second: SecondLabels | None = None,
) -> list[Tensor]:
    """d/dz_k = grad_ce_k * (softmax(z_k) - onehot(y)), each (N, C) in its logits' dtype.

    grad_ce (K, N) already holds d loss / d CE_k in full, and 0 on ignored rows, whose logits are not looked at.
    """
    labels = labels_of(target, second, logits[0].shape[-1], None)
    gradients = []
    for z, lse_k, g in zip(logits, lse, grad_ce, strict=True):
        rows = _rows(z)
        gradient = g.unsqueeze(-1) * ((rows - lse_k.unsqueeze(-1)).exp() - labels.onehot(rows))
        gradients.append(gradient.masked_fill((g == 0).unsqueeze(-1), 0.0).to(z.dtype))
    return gradients


def count_labels(
    target: Tensor, C: int, ignore_index: int, second: SecondLabels | None = None
) -> tuple[int, int | None]:
    """See `contract.LabelCounter`."""
    labels = labels_of(target, second, C, ignore_index)
    invalid = (~labels.valid).nonzero()
    row = int(invalid[0]) if invalid.numel() else None
    return int((~labels.ignored[:row]).sum()), row


def ce_gradient(weights: Tensor, grad_weights: Tensor, grad_ce: Tensor) -> Tensor:
    """Chain d loss / d w and d loss / d CE, both (K, N), into the total d loss / d CE (K, N).

    With sigma = softmax_k(CE): w_k = (1 - sigma_k) / (K - 1), so
    d w_k / d CE_j = -sigma_k (delta_kj - sigma_j) / (K - 1), and sigma_k = 1 - (K - 1) w_k.
    """
    K = weights.shape[0]
    if K == 1:
        return grad_ce
    sigma = 1.0 - (K - 1) * weights
    mean = (sigma * grad_weights).sum(0, keepdim=True)
    return grad_ce - sigma * (grad_weights - mean) / (K - 1)


def feature_forward(student: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """error (K, N): mean over the values of a sample of (F_k - r_k)^2. Differentiable."""
    errors = []
    for r, f in zip(student, teachers, strict=True):
        dtype = accumulation_dtype(r.dtype)
        errors.append((r.to(dtype) - f.to(dtype)).square().flatten(1).mean(-1))
    return torch.stack(errors)


def feature_rows(weights: Tensor, error: Tensor) -> Tensor:
    """sum_k w_k error_k of each sample, from (K, N) weights and errors. Differentiable."""
    return _weighted_sum(weights, error)


def feature_backward(student: Sequence[Tensor], teachers: Sequence[Tensor], grad_error: Tensor) -> list[Tensor]:
    """d loss / d r_k = grad_error_k * 2 (r_k - F_k) / M_k in the dtype of r_k; 0 where grad_error is 0."""
    grads = []
    for r, f, g in zip(student, teachers, grad_error, strict=True):
        dtype = accumulation_dtype(r.dtype)
        factor = (g * (2.0 / max(sample_size(r), 1))).view(-1, *[1] * (r.dim() - 1))
        gradient = (factor * (r.to(dtype) - f.to(dtype))).masked_fill(factor == 0, 0.0)
        grads.append(in_memory_order(gradient.to(r.dtype), gradient_strides(r)))
    return grads


@torch.no_grad()
def feature_loss(
    student: Sequence[Tensor],
    teachers: Sequence[Tensor],
    weights: Tensor,
    *,
    needs_grad: bool,
    scale: float | Tensor = 1.0,
    grad_scale: float | Tensor = 1.0,
    together: bool = False,
) -> FeatureLossResult:
    """See `contract.Backend`."""
    error = feature_forward(student, teachers)
    error = error.masked_fill((weights == 0) & ~error.isfinite(), 0.0)
    loss = feature_rows(weights, error).sum() * (scale.reshape(()) if isinstance(scale, Tensor) else scale)
    if not needs_grad:
        return FeatureLossResult(loss, error, [], None)
    grads = feature_backward(student, teachers, weights * scale * grad_scale)
    if not together:
        return FeatureLossResult(loss, error, grads, None)
    views, buffer = new_gradients(student, together=True)
    for view, grad in zip(views, grads, strict=True):
        view.copy_(grad)
    return FeatureLossResult(loss, error, views, buffer)
