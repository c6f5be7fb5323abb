"""Logits from what a head computes: outer * tanh(inner * x), or inner * x without a softcap.

MAPS has a letter for every tensor, the student first (`results.formula_constants`); it is "" if no tensor is mapped.
tanh is not libdevice's, which neither Triton's interpreter nor ROCm has.
"""

import triton
import triton.language as tl

from .softmax import LOG2E, label_distance, label_logits


@triton.jit
def tanh_and_slope(x):
    """tanh(x) and 1 - tanh(x)^2 with small relative errors, near 0 and where tanh is almost 1."""
    magnitude = tl.abs(x)
    t = tl.exp2(magnitude * (-2.0 * LOG2E))
    inverse = 1.0 / (1.0 + t)
    # Near 0 (1 - t) / (1 + t) would cancel. x + x^3 p(x^2) up to 0.625, coefficients of tanhf in the Cephes library
    square = magnitude * magnitude
    p = square * -5.70498872745e-3 + 2.06390887954e-2
    p = p * square - 5.37397155531e-2
    p = p * square + 1.33314422036e-1
    p = p * square - 3.33332819422e-1
    small = magnitude + magnitude * square * p
    large = magnitude > 0.625
    value = tl.where(large, (1.0 - t) * inverse, small)
    return tl.where(x < 0, -value, value), tl.where(large, 4.0 * t * inverse * inverse, 1.0 - small * small)


@triton.jit
def mapped(x, maps, k: tl.constexpr, MAPS: tl.constexpr):
    """fp32 logits of tensor k."""
    if MAPS == "":
        return x
    elif MAPS[k] == "c":
        return maps[k].outer * tanh_and_slope(maps[k].inner * x)[0]
    elif MAPS[k] == "s":
        return maps[k].inner * x
    else:
        return x


@triton.jit
def masked(z, mask, k: tl.constexpr, MAPS: tl.constexpr):
    """Loaded logits with -inf beyond the row again, which a softcap has made finite."""
    if MAPS == "":
        return z
    elif MAPS[k] == "c":
        return tl.where(mask, z, float("-inf"))
    else:
        return z


@triton.jit
def load_logits(pointers, maps, k: tl.constexpr, MAPS: tl.constexpr, mask):
    """fp32 logits of tensor k, -inf outside the mask."""
    x = tl.load(pointers, mask=mask, other=float("-inf")).to(tl.float32)
    return masked(mapped(x, maps, k, MAPS), mask, k, MAPS)


@triton.jit
def mapped_labels(row, labels, readable, maps, k: tl.constexpr, MAPS: tl.constexpr, TWO: tl.constexpr):
    """`label_logits` of tensor k."""
    first, second = label_logits(row, labels, readable, TWO)
    return mapped(first, maps, k, MAPS), mapped(second, maps, k, MAPS)


@triton.jit
def mapped_label_distance(row, top, labels, readable, maps, k: tl.constexpr, MAPS: tl.constexpr, TWO: tl.constexpr):
    """`loaded_label_distance` of tensor k."""
    return label_distance(mapped_labels(row, labels, readable, maps, k, MAPS, TWO), top, labels, TWO)


@triton.jit
def map_gradient(gradient, pointers, mask, maps, MAPS: tl.constexpr):
    """The gradient by the student's tensor, which is read again, from that by its logits."""
    if MAPS == "":
        return gradient
    elif MAPS[0] == "c":
        x = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        # One factor after the other: their product may overflow where the gradient is 0.
        return gradient * tanh_and_slope(maps[0].inner * x)[1] * maps[0].inner * maps[0].outer
    elif MAPS[0] == "s":
        return gradient * maps[0].inner
    else:
        return gradient
