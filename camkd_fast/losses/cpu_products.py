"""Matrix products of float32 on a CPU, by the library that is faster on this processor.

PyTorch multiplies float32 matrices by MKL, which computes on AMD's processors as if they had no AVX-512. oneDNN, which
PyTorch brings too, takes half of the time there (benchmarks/results, linear_loss.json). On others MKL is kept.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


@functools.cache
def prefers_onednn() -> bool:
    """Whether oneDNN is at hand and this is an AMD processor with AVX-512."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # type: ignore[no-untyped-call]
        return False
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older versions do not say
    return bool(found.get("avx512_f")) and "AMD" in str(found.get("cpu_name"))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (m, k) @ b (k, n), without gradients."""
    return _by_onednn(a, b) if _takes_onednn(a) else a @ b


def product_of_transposed(a: Tensor, b: Tensor) -> Tensor:
    """a (k, m) transposed @ b (k, n), without gradients."""
    # oneDNN needs a third of the time if the wider matrix is the second one.
    return _by_onednn(b.t(), a).t() if _takes_onednn(a) else a.t() @ b


def _takes_onednn(a: Tensor) -> bool:
    return a.dtype == torch.float32 and a.numel() > 0 and prefers_onednn()


def _by_onednn(a: Tensor, b: Tensor) -> Tensor:
    # It takes a thousand times as long if the second matrix is a part of a wider one.
    if not (b.is_contiguous() or b.t().is_contiguous()):
        b = b.contiguous()
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")  # type: ignore[no-any-return]
