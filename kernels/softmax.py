"""Device functions shared by the kernels: row addressing, exponentials, running softmax statistics, teacher weights.

Softmax statistics are relative to a maximum, which is subtracted *before* scaling by log2(e) / T, so a large common
offset of a row costs no accuracy.
"""

import triton
import triton.language as tl

from ..backends.contract import HARD as _HARD
from ..backends.contract import LOSS as _LOSS
from ..backends.contract import PER_TEACHER as _PER_TEACHER
from ..backends.contract import SOFT as _SOFT
from .formula import loss_terms

# Rows of row_stats (3 + 3K, N).
LOSS, HARD, SOFT = tl.constexpr(_LOSS), tl.constexpr(_HARD), tl.constexpr(_SOFT)
PER_TEACHER = tl.constexpr(_PER_TEACHER)
LOG2E = tl.constexpr(1.4426950408889634)
# Initial running maximum of a lane: finite, so that differences of maxima are never inf - inf, and no larger than any
# finite logit, so that rows masked with finfo.min remain exact.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def stride(argument):
    """Inverse of `layout.unspecialised` for one stride."""
    return (argument - 3) >> 1


@triton.jit
def row_offset(n, S, stride_outer, stride_inner, ALIGN: tl.constexpr, TWO_LEVEL: tl.constexpr):
    """First element of row n (int64), strides in units of ALIGN."""
    if TWO_LEVEL:
        return ((n // S) * stride_outer + (n % S) * stride_inner) * ALIGN
    else:
        return n * stride_outer * ALIGN


@triton.jit
def load_labels(target, n, in_range, ignore_index, C, DEBUG: tl.constexpr):
    """label, kept (not ignored) and inside (0 <= label < C) of rows n; rows beyond N count as ignored."""
    y = tl.load(target + n, mask=in_range, other=0)
    kept = in_range & (y != ignore_index)
    inside = (y >= 0) & (y < C)
    if DEBUG:
        tl.device_assert(inside | (kept == 0), "camkd_fast: a label lies outside [0, C)")
    return y, kept, inside


@triton.jit
def label_logit(row, y, readable):
    """The logit at the label; NaN for an invalid label, which propagates to everything that depends on it."""
    return tl.load(row + y, mask=readable, other=0.0).to(tl.float32) + tl.where(readable, 0.0, float("nan"))


@triton.jit
def exp_at_one(e, x, T_POWER: tl.constexpr):
    """e^x from e = e^{x/T}: by multiplications if T is T_POWER, by another exponential if T_POWER is 0."""
    if T_POWER == 1:
        return e
    elif T_POWER == 2:
        return e * e
    elif T_POWER == 4:
        square = e * e
        return square * square
    else:
        return tl.exp2(x * LOG2E)


@triton.jit
def lane_max(top, x):
    """New running maximum of lanes (..., R) after x (..., R, V), and old minus new maximum."""
    new = tl.maximum(top, tl.max(x, axis=-1))
    return new, top - new


@triton.jit
def lane_rescale(value, decay):
    """A running sum relative to its new maximum; exactly 0 if the decay underflows, even for an infinite sum."""
    return tl.where(decay > 0, value * decay, 0.0)


@triton.jit
def finite_max(x):
    """Row maxima of (BLOCK_N, BLOCK_C); 0 for a row of only -inf, whose sums are then 0 rather than NaN."""
    top = tl.max(x, axis=1)
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def relative_share(score, top, WEIGHTING: tl.constexpr):
    """A teacher's unnormalised share of the mass over teachers; 1 for the `top` score.

    "confidence": e^{CE_k}, equal shares for infinite ones; "entropy": H_k, equal shares if all are 0.
    """
    if WEIGHTING == "confidence":
        return tl.where(score == top, 1.0, tl.exp(score - top))
    else:
        return tl.where(top > 0, score / top, 1.0)


@triton.jit
def weights_from_scores(scores, K: tl.constexpr, WEIGHTING: tl.constexpr):
    """K weights from K scores, K >= 2: (1 - softmax_k) / (K - 1) or 1 - ratio_k."""
    top = scores[0]
    for k in tl.static_range(1, K):
        top = tl.maximum(top, scores[k])
    total = tl.zeros_like(top)
    for k in tl.static_range(K):
        total += relative_share(scores[k], top, WEIGHTING)
    weights = ()
    for k in tl.static_range(K):
        weight = 1.0 - relative_share(scores[k], top, WEIGHTING) / total
        if WEIGHTING == "confidence":
            weight = weight / (K - 1)
        weights += (weight,)
    return weights


@triton.jit
def store_stat(row_stats, row, N, n, value, kept, in_range):
    """row_stats[row, n] = value, 0 on ignored rows."""
    pointers = row_stats + row * tl.cast(N, tl.int64) + n
    tl.store(pointers, tl.where(kept, value, 0.0), mask=in_range)


@triton.jit
def store_teacher(row_stats, k, N, n, divergence, ce, kept, in_range, K: tl.constexpr):
    """KL_k and CE_k of rows n."""
    store_stat(row_stats, PER_TEACHER + k, N, n, divergence, kept, in_range)
    store_stat(row_stats, PER_TEACHER + K + k, N, n, ce, kept, in_range)


@triton.jit
def store_loss(row_stats, N, n, hard, divergence, weights, kept, inside, in_range, formula, K: tl.constexpr):
    """w_k, loss, hard and soft of rows n. Returns W = sum_k w_k."""
    weighted_divergence = tl.zeros_like(hard)
    weight_sum = tl.zeros_like(hard)
    for k in tl.static_range(K):
        store_stat(row_stats, PER_TEACHER + 2 * K + k, N, n, weights[k], kept, in_range)
        weighted_divergence += tl.where(weights[k] == 0, 0.0, weights[k] * divergence[k])
        weight_sum += weights[k]
    loss, soft = loss_terms(hard, weighted_divergence, formula)
    store_stat(row_stats, LOSS, N, n, tl.where(inside, loss, float("nan")), kept, in_range)
    store_stat(row_stats, HARD, N, n, hard, kept, in_range)
    store_stat(row_stats, SOFT, N, n, soft, kept, in_range)
    return weight_sum
