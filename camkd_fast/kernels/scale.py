"""`scale_rows`: the stored gradient times one factor, or a factor for each row. 0 stays 0, as in ignored rows."""

from __future__ import annotations

import functools
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launch_table import elementwise_launch
from .launcher import Launcher
from .layout import Layout, common_alignment, layouts


@triton.jit(do_not_specialize=["stride_fn", "N", "C_units"])
def scale_rows_kernel(
    grad,  # (N, C) contiguous
    factor,  # (N,) fp32
    out,  # (N, C) contiguous, may be `grad`
    stride_fn,
    N, C_units,
    IN_PLACE: tl.constexpr,  # one factor, and `out` is `grad`
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    if IN_PLACE:  # noqa: SIM102 - decided at compilation
        # `loss.backward()` multiplies by 1, which only the device knows.
        if tl.load(factor) == 1.0:
            return
    C = tl.cast(C_units, tl.int64) * ALIGN
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(C, BLOCK_C)
    n = (pid // blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = (pid % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (n < N)[:, None] & (cols < C)[None, :]
    offsets = n[:, None] * C + cols[None, :]
    f = tl.load(factor + n * stride_fn, mask=n < N, other=0.0)
    r = tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + offsets, tl.where(r == 0.0, 0.0, r * f[:, None]).to(out.dtype.element_ty), mask=mask)


def scale_rows(grad: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    """See `contract.Backend`; the factor is read on the device."""
    if grad.numel() == 0:
        return out
    one_factor, in_place = factor.numel() == 1, out.data_ptr() == grad.data_ptr()
    launch = _launcher(layouts([grad]), factor.stride(0), one_factor, one_factor and in_place)
    launch(grad, factor, out)
    return out


@functools.lru_cache(maxsize=1024)
def _launcher(grads: tuple[Any, ...], stride_fn: int, one_factor: bool, IN_PLACE: bool) -> Launcher:
    grad = Layout(*grads[0])
    N, C = grad.shape
    if one_factor:
        # The matrix is one long row, so that the width does not spoil wide accesses.
        N, C = 1, N * C
    ALIGN = common_alignment(grad.aligned, [C])
    BLOCK_N, BLOCK_C, num_warps = elementwise_launch(C, grad.dtype.itemsize)
    grid = -(-N // BLOCK_N) * -(-C // BLOCK_C)
    constants = {"IN_PLACE": IN_PLACE, "ALIGN": ALIGN, "BLOCK_N": BLOCK_N, "BLOCK_C": BLOCK_C}
    return Launcher(scale_rows_kernel, grid, (stride_fn, N, C // ALIGN), constants, num_warps=num_warps)
