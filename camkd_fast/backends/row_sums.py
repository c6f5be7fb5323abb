"""The row op in two steps, for rows of which each process has some of the classes: sums over columns, then results.

A softmax over all classes takes few numbers from the other processes: seven per row and model, of the columns that are
here relative to their own maximum. `row_sums` computes them, `merged` makes those of whole rows of all processes' ones,
and `row_results` the numbers and the gradient of `reference` of these. Divergences of a mixture (jsd, skew) take sums
over the mixtures, for which whole rows' probabilities must be known: `row_sums` once more, added up.

With d = x - max and exponentials e = e^{d / T}, of student s and teacher k:

    max      the largest logit                  sum_T    sum_c e_c                sum_1   sum_c e^{d_c}
    cross    forward_kl: sum_c e_kc (d_kc - d_sc); reverse_kl: sum_c e_sc (d_sc - d_kc); a mixture: its D
    plogp    of a teacher sum_c e^{d_c} d_c, of the student sum_c e_c d_c
    label    d at the label, NaN where that is not here
    center   of a mixture sum_c q_c g_c, see `divergences`

A student has neither cross nor center; `losses.vocabulary` uses their places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..losses.divergence import FORWARD_KL, REVERSE_KL
from ..losses.formula import Formula
from .contract import CENTER, CROSS, LABEL, MAX, PLOGP, ROW_SUMS, SUM_1, SUM_T, RowLossResult
from .divergences import divergence_gradient, divergence_of, divergence_slopes
from .reference import RowTerms, logits_of, map_gradient, row_stats_of, weighted_sum_of


def is_mixture(formula: Formula) -> bool:
    """Whether there are sums over mixtures, a step of their own."""
    return formula.divergence_kind().kind in ("jsd", "skew")


@torch.no_grad()
def row_sums(
    student: Tensor, teachers: Sequence[Tensor], target: Tensor, formula: Formula, whole: Tensor | None = None
) -> Tensor:
    """See `contract.ShardBackend`."""
    T = formula.temperature
    streams = _streams(student, teachers, formula)
    if whole is not None:
        log_q, *log_ps = _log_probabilities(streams, whole, T)
        kind, result = formula.divergence_kind(), whole.clone()
        for k, log_p in enumerate(log_ps, 1):
            q, g = divergence_slopes(log_p, log_q, kind)
            result[k, CROSS], result[k, CENTER] = divergence_of(log_p, log_q, kind), (q * g).sum(-1)
        return result
    result = streams[0].new_zeros((len(streams), ROW_SUMS, len(target)))
    here = (target >= 0) & (target < student.shape[-1])
    column = target.clamp(0, student.shape[-1] - 1).unsqueeze(-1)
    distances = []
    for k, x in enumerate(streams):
        top = x.amax(-1)
        distances.append(d := x - _finite(top).unsqueeze(-1))
        e, e1 = (d / T).exp(), d.exp()
        label = d.gather(-1, column).squeeze(-1).masked_fill(~here, torch.nan)
        plogp = _expected(e1 if k else e, d)
        for i, numbers in ((MAX, top), (SUM_T, e.sum(-1)), (SUM_1, e1.sum(-1)), (PLOGP, plogp), (LABEL, label)):
            result[k, i] = numbers
    s = distances[0]
    for k, z in enumerate(distances[1:], 1):
        if formula.divergence_kind() == FORWARD_KL:
            result[k, CROSS] = _expected((z / T).exp(), z - s)
        elif formula.divergence_kind() == REVERSE_KL:
            result[k, CROSS] = _expected((s / T).exp(), s - z)
    return result


def merged(parts: Tensor, formula: Formula) -> tuple[Tensor, Tensor]:
    """The sums of whole rows (K + 1, 7, N), and how many parts have the label of each row (N,).

    Args:
        parts: (R, K + 1, 7, N), the `row_sums` of R processes. The label's sum is NaN unless just one part has it.
    """
    T, wide = formula.temperature, parts.double()
    top, sumT, sum1, cross, plogp, label = (wide[:, :, i] for i in (MAX, SUM_T, SUM_1, CROSS, PLOGP, LABEL))
    whole = top.amax(0)
    empty = top.isneginf()  # no finite logit in that part: its sums are 0
    drop = (top - _finite(whole)).masked_fill(empty, 0.0)
    factorT, factor1 = ((drop / t).exp().masked_fill(empty, 0.0) for t in (T, 1.0))
    # From distances to the part's maxima to those to the row's; a part that has become 0 is 0, infinite or not
    of_student, of_teachers = slice(0, 1), slice(1, None)
    if formula.divergence_kind() == REVERSE_KL:
        by, base, change = factorT[:, of_student], sumT[:, of_student], drop[:, of_student] - drop[:, of_teachers]
    else:
        by, base, change = factorT[:, of_teachers], sumT[:, of_teachers], drop[:, of_teachers] - drop[:, of_student]
    result = torch.zeros_like(wide[0])
    result[:, MAX] = whole
    result[:, SUM_T], result[:, SUM_1] = (factorT * sumT).sum(0), (factor1 * sum1).sum(0)
    result[of_teachers, CROSS] = _scaled(by, cross[:, of_teachers] + base * change).sum(0)
    result[of_teachers, PLOGP] = _scaled(factor1, plogp + sum1 * drop)[:, of_teachers].sum(0)
    result[of_student, PLOGP] = _scaled(factorT, plogp + sumT * drop)[:, of_student].sum(0)
    has = ~label.isnan()
    owners = has.any(1).sum(0)
    at_label = (label + drop).masked_fill(~has, 0.0).sum(0)
    result[:, LABEL] = at_label.masked_fill(owners != 1, torch.nan)
    return result.to(parts.dtype), owners


@torch.no_grad()
def row_results(
    student: Tensor,
    teachers: Sequence[Tensor],
    target: Tensor,
    formula: Formula,
    sums: Tensor,
    *,
    needs_grad: bool,
    grad_scale: float | Tensor = 1.0,
    out: Tensor | None = None,
) -> RowLossResult:
    """See `contract.ShardBackend`."""
    T, kind = formula.temperature, formula.divergence_kind()
    ignored = target == formula.ignore_index
    valid = ignored | ~sums[0, LABEL].isnan()
    log_sumT, log_sum1 = sums[:, SUM_T].log(), sums[:, SUM_1].log()
    lse, ce = sums[:, MAX] + log_sum1, log_sum1 - sums[:, LABEL]
    divergence = sums[1:, CROSS]
    if kind == FORWARD_KL:
        divergence = divergence / (sums[1:, SUM_T] * T) + log_sumT[0] - log_sumT[1:]
    elif kind == REVERSE_KL:
        divergence = divergence / (sums[0, SUM_T] * T) + log_sumT[1:] - log_sumT[0]
    entropy = log_sumT[0] - sums[0, PLOGP] / (sums[0, SUM_T] * T)
    teacher_entropy = log_sum1[1:] - sums[1:, PLOGP] / sums[1:, SUM_1]
    terms = RowTerms(divergence, ce[1:], teacher_entropy, ce[0], lse[0], entropy)
    result = RowLossResult(row_stats_of(terms, formula, valid, ignored), None)
    if not needs_grad:
        return result
    streams = _streams(student, teachers, formula)
    distances = [x - top.unsqueeze(-1) for x, top in zip(streams, _finite(sums[:, MAX]), strict=True)]
    soft = _soft_gradient(streams, distances, sums, formula, result.weights.unsqueeze(-1))
    p = distances[0].exp() / sums[0, SUM_1].unsqueeze(-1)
    here = (target >= 0) & (target < student.shape[-1]) & ~ignored
    column = target.clamp(0, student.shape[-1] - 1).unsqueeze(-1)
    onehot = torch.zeros_like(p).scatter(-1, column, here.to(p.dtype).unsqueeze(-1))
    gradient = formula.soft_grad_scale() * soft + formula.hard_weight * (p - onehot)
    if formula.z_loss_weight != 0.0:
        gradient = gradient + 2.0 * formula.z_loss_weight * lse[0].unsqueeze(-1) * p
    gradient = map_gradient(streams[0], formula.student_map(), gradient) * grad_scale
    gradient = gradient.masked_fill(~valid.unsqueeze(-1), torch.nan).masked_fill(ignored.unsqueeze(-1), 0.0)
    return replace(result, grad_student=gradient.to(student.dtype) if out is None else out.copy_(gradient))


def _soft_gradient(
    streams: Sequence[Tensor], distances: Sequence[Tensor], sums: Tensor, formula: Formula, weights: Tensor
) -> Tensor:
    """T d/ds of sum_k w_k D_k for weights (K, N, 1); 0 if nobody asks for it, whatever the teachers are.

    Args:
        distances: of the streams from the maxima of whole rows, (N, C) each.
    """
    T, kind = formula.temperature, formula.divergence_kind()
    if formula.soft_weight == 0.0:
        return torch.zeros_like(distances[0])
    # From distances where that is possible: logarithms of probabilities have the rounding of large numbers
    q, *ps = ((d / T).exp() / sumT.unsqueeze(-1) for d, sumT in zip(distances, sums[:, SUM_T], strict=True))
    if kind == FORWARD_KL:
        gradient: Tensor = weights.sum(0) * q - weighted_sum_of(weights, ps)
        return gradient
    if kind == REVERSE_KL:
        centers = (sums[1:, CROSS] / (sums[0, SUM_T] * T)).unsqueeze(-1)
        centers = centers.masked_fill(centers.isinf(), torch.nan)
        ratios = (((distances[0] - d) / T).masked_fill(q == 0, 0.0) for d in distances[1:])
        return weighted_sum_of(weights, [q * (g - center) for g, center in zip(ratios, centers, strict=True)])
    log_q, *log_ps = _log_probabilities(streams, sums, T)
    pairs = zip(log_ps, sums[1:, CENTER].unsqueeze(-1), strict=True)
    return weighted_sum_of(weights, [divergence_gradient(log_p, log_q, kind, center) for log_p, center in pairs])


def _streams(student: Tensor, teachers: Sequence[Tensor], formula: Formula) -> list[Tensor]:
    """The logits of student and teachers, (N, C) each in the accumulation dtype."""
    s = logits_of(student, formula.student_map())
    return [s, *(logits_of(z, formula.teacher_map(k), s.dtype) for k, z in enumerate(teachers))]


def _log_probabilities(streams: Sequence[Tensor], sums: Tensor, T: float) -> list[Tensor]:
    """Of whole rows, at the columns that are here."""
    numbers = zip(streams, _finite(sums[:, MAX]), sums[:, SUM_T].log(), strict=True)
    return [(x - top.unsqueeze(-1)) / T - log_sum.unsqueeze(-1) for x, top, log_sum in numbers]


def _finite(top: Tensor) -> Tensor:
    """The maximum to subtract; without a finite logit any number will do."""
    return top.masked_fill(top.isneginf(), 0.0)


def _expected(e: Tensor, x: Tensor) -> Tensor:
    """sum_c e x, columns with e = 0 counting 0."""
    return (e * x.masked_fill(e == 0, 0.0)).sum(-1)


def _scaled(factor: Tensor, sums: Tensor) -> Tensor:
    """factor * sums, 0 where the factor is."""
    return factor * sums.masked_fill(factor == 0, 0.0)
