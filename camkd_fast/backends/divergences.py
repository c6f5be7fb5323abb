"""The divergences of a teacher from the student and their gradients, for `reference`: the specification of each.

Notation of one row: q = softmax(s / T) of the student, p of a teacher, M the mixture of the divergence.

    forward_kl    D = sum_c p_c (log p_c - log q_c)
    reverse_kl    D = sum_c q_c (log q_c - log p_c)
    jsd(beta)     D = beta sum_c p_c log(p_c / M_c) + (1 - beta) sum_c q_c log(q_c / M_c),  M = beta p + (1 - beta) q
    skew(alpha)   D = sum_c p_c log(p_c / M_c),                                             M = alpha p + (1 - alpha) q

Where p_c and q_c are nearly equal, as at the label of a nearly certain row, the terms of jsd and skew above round to
more than they add up to. The kernels add terms that do not cancel, with the same sum because p, q and M add up to 1:

    jsd(beta)     M_c (beta h(p_c / M_c) + (1 - beta) h(q_c / M_c)),  h(x) = x log x - x + 1 >= 0
    skew(alpha)   M_c h(p_c / M_c)

Gradient. Let g_c = dD / dq_c. Through the softmax, T dD / ds_c = q_c (g_c - sum_j q_j g_j), and with several teachers
the sum over k of w_k times that. A constant in g cancels:

    forward_kl    q_c g_c = -p_c, so that T dD / ds_c = q_c - p_c
    reverse_kl    g_c = log q_c - log p_c
    jsd(beta)     g_c = (1 - beta) log(q_c / M_c), because the derivatives of M_c add up to -(1 - beta), a constant
    skew(alpha)   g_c = -(1 - alpha) p_c / M_c

Edges. A column of probability 0 (logit -inf, or so low that its exponential is 0) contributes 0 to the sum over that
probability, and 0 to the gradient if q_c = 0. forward_kl is +inf where p_c > 0 and q_c = 0, reverse_kl where q_c > 0
and p_c = 0; then the gradient of reverse_kl is NaN in the whole row, while that of forward_kl is finite. jsd and skew
are always finite.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..losses.divergence import Divergence


def divergence_of(log_p: Tensor, log_q: Tensor, divergence: Divergence) -> Tensor:
    """D (N,) from log-probabilities (N, C). Differentiable."""
    kind, mixture_share = divergence
    if kind == "forward_kl":
        return _expected_ratio(log_p, log_q)
    if kind == "reverse_kl":
        return _expected_ratio(log_q, log_p)
    log_m = _log_mixture(log_p, log_q, mixture_share)
    if kind == "skew":
        return _expected_ratio(log_p, log_m)
    return mixture_share * _expected_ratio(log_p, log_m) + (1.0 - mixture_share) * _expected_ratio(log_q, log_m)


def divergence_gradient(log_p: Tensor, log_q: Tensor, divergence: Divergence, center: Tensor | None = None) -> Tensor:
    """T dD / ds (N, C), for every divergence but the forward KL, of which `reference` needs one mixture only.

    Args:
        center: sum_j q_j g_j (N, 1) of whole rows, if these columns are some of theirs.
    """
    q, g = divergence_slopes(log_p, log_q, divergence)
    center = (q * g).sum(-1, keepdim=True) if center is None else center
    return q * (g - center.masked_fill(center.isinf(), float("nan")))


def divergence_slopes(log_p: Tensor, log_q: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """q and g (N, C), the latter 0 where q is."""
    kind, mixture_share = divergence
    q = log_q.exp()
    if kind == "reverse_kl":
        g = log_q - log_p
    elif kind == "jsd":
        g = (1.0 - mixture_share) * (log_q - _log_mixture(log_p, log_q, mixture_share))
    else:
        assert kind == "skew", f"no gradient of {kind}"
        g = -(1.0 - mixture_share) * (log_p - _log_mixture(log_p, log_q, mixture_share)).exp()
    return q, g.masked_fill(q == 0, 0.0)


def _expected_ratio(log_a: Tensor, log_b: Tensor) -> Tensor:
    """sum_c a (log a - log b), columns with a = 0 counting 0, in the value and in every derivative."""
    a = log_a.exp()
    return (a * (log_a - log_b).masked_fill(a == 0, 0.0)).sum(-1)


def _log_mixture(log_p: Tensor, log_q: Tensor, mixture_share: float) -> Tensor:
    """log(mixture_share p + (1 - mixture_share) q); where both are 0 any finite number will do."""
    a, b = log_p + math.log(mixture_share), log_q + math.log1p(-mixture_share)
    dead = a.isneginf() & b.isneginf()
    return torch.logaddexp(a.masked_fill(dead, 0.0), b)
