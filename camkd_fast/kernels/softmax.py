"""Device functions shared by the kernels: row addressing, exponentials, running softmax statistics, teacher weights.

Softmax statistics are relative to a maximum, which is subtracted *before* scaling by log2(e) / T, so a large common
offset of a row costs no accuracy.
"""

import triton
import triton.language as tl

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
def load_labels(target, second_target, mix, n, in_range, ignore_index, C, DEBUG: tl.constexpr):
    """The labels of rows n: (label, second label, share of the first), kept (not ignored) and valid (labels and share).

    Without second labels (None) the share is 1; so it is for a row with a share of 0 or twice the same label, whose
    label is the one that counts. Rows beyond N count as ignored.
    """
    y = tl.load(target + n, mask=in_range, other=0)
    kept = in_range & (y != ignore_index)
    valid = (y >= 0) & (y < C)
    second = y
    share = kept.to(tl.float32)
    if second_target is not None:
        second = tl.load(second_target + n, mask=kept, other=0)
        share = tl.load(mix + n, mask=kept, other=1.0)
        valid &= (second >= 0) & (second < C) & (second != ignore_index) & (share >= 0) & (share <= 1)
        one = (share == 0) | (second == y)
        y = tl.where(share == 0, second, y)
        share = tl.where(one, 1.0, share)
    if DEBUG:
        tl.device_assert(valid | (kept == 0), "camkd_fast: a label lies outside [0, C), or its share outside [0, 1]")
    return (y, second, share), kept, valid


@triton.jit
def label_logits(row, labels, readable, TWO: tl.constexpr):
    """The logits at both labels; NaN for invalid labels, which propagates to everything that depends on them."""
    y, second, share = labels
    first = tl.load(row + y, mask=readable, other=0.0).to(tl.float32) + tl.where(readable, 0.0, float("nan"))
    if TWO:
        return first, tl.load(row + second, mask=readable & (share < 1), other=0.0).to(tl.float32)
    else:
        return first, first


@triton.jit
def label_distance(logits, top, labels, TWO: tl.constexpr):
    """`label_logits` minus the row's maximum, averaged by the shares of the labels."""
    first, second = logits
    distance = first - top
    if TWO:
        share = labels[2]
        distance = tl.where(share < 1, share * distance + (1 - share) * (second - top), distance)
    return distance


@triton.jit
def loaded_label_distance(row, top, labels, readable, TWO: tl.constexpr):
    """The same from the row."""
    return label_distance(label_logits(row, labels, readable, TWO), top, labels, TWO)


@triton.jit
def label_shares(cols, labels, TWO: tl.constexpr):
    """The share of each label in its column, 0 elsewhere."""
    y, second, share = labels
    if TWO:
        return tl.where(cols == y, share, 0.0) + tl.where(cols == second, 1 - share, 0.0)
    else:
        return tl.where(cols == y, 1.0, 0.0)


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
def relative_mass(score, top, WEIGHTING: tl.constexpr):
    """A teacher's unnormalised mass among the teachers; 1 for the `top` score.

    "confidence": e^{CE_k}, equal masses for infinite ones; "entropy": H_k, equal masses if all are 0.
    """
    if WEIGHTING == "confidence":
        return tl.where(score == top, 1.0, tl.exp(score - top))
    else:
        return tl.where(top > 0, score / top, 1.0)


@triton.jit
def weights_from_scores(scores, K: tl.constexpr, WEIGHTING: tl.constexpr):
    """K weights from K scores, K >= 2: what the others have of all mass, over K - 1 for "confidence"."""
    top = scores[0]
    for k in tl.static_range(1, K):
        top = tl.maximum(top, scores[k])
    total = tl.zeros_like(top)
    masses = ()
    for k in tl.static_range(K):
        masses += (relative_mass(scores[k], top, WEIGHTING),)
        total += masses[k]
    weights = ()
    for k in tl.static_range(K):
        # 1 - mass / total would cancel for a teacher that has nearly all of it
        others = tl.zeros_like(top)
        for j in tl.static_range(K):
            if j != k:
                others += masses[j]
        weight = others / total
        if WEIGHTING == "confidence":
            weight = weight / (K - 1)
        weights += (weight,)
    return weights


@triton.jit
def weights_of_lowest(ce, K: tl.constexpr):
    """K weights from K cross-entropies: 1 for the first of the lowest, NaN for all if one is NaN."""
    lowest = ce[0]
    for k in tl.static_range(1, K):
        lowest = lower(ce[k], lowest)
    left = tl.full(lowest.shape, 1.0, tl.float32)
    weights = ()
    for k in tl.static_range(K):
        weight = tl.where(ce[k] == lowest, left, 0.0)
        left -= weight
        weights += (tl.where(lowest != lowest, lowest, weight),)
    return weights


@triton.jit
def lower(x, lowest):
    """The minimum, or NaN if either is."""
    return tl.where((x < lowest) | (x != x), x, lowest)


@triton.jit
def row_weights(scores, given, stride_wk, stride_wn, n, K: tl.constexpr, WEIGHTING: tl.constexpr):
    """K weights of row n from K scores, or the given ones."""
    if WEIGHTING == "confidence" or WEIGHTING == "entropy":
        return weights_from_scores(scores, K, WEIGHTING)
    elif WEIGHTING == "min_ce":
        return weights_of_lowest(scores, K)
    else:
        weights = ()
        for k in tl.static_range(K):
            if WEIGHTING == "given":
                weights += (tl.load(given + k * stride_wk + n * stride_wn),)
            else:
                weights += (tl.full((), 1.0 / K, tl.float32),)
        return weights
