"""The matrix products between hidden states and the head of a language model.

From rows of hidden states (m, H) the head makes logits (m, C), in memory of the caller; from the gradient of the logits
come those of rows and head. Everything else of the linear loss is computed between these products.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .cpu_products import prefers_onednn, product, product_of_transposed

# Bytes of a float32 tile of the head, which stays in a shared cache; at least TILE_ROWS classes, for the products.
TILE_BYTES, TILE_ROWS = 1 << 21, 512


@functools.cache
def has_bfloat16_products() -> bool:
    """Whether this processor has instructions for them. Without, they take nine times as long as float32's."""
    asks: list[Callable[[], bool]] = [
        getattr(torch.cpu, name, bool) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    ]
    return any(ask() for ask in asks)


def default_logits_dtype(head: Tensor) -> torch.dtype:
    """Of a bfloat16 head: float32 unless that would give up a processor's instructions, which round their results."""
    return torch.bfloat16 if head.is_cpu and has_bfloat16_products() else torch.float32


def _has_products(dtype: torch.dtype) -> bool:
    """Whether a CPU multiplies matrices of this dtype well as a whole."""
    if dtype == torch.float32:
        return not prefers_onednn()  # whose results go to memory of its own: by tiles, for less of it
    return dtype == torch.float64 or (dtype == torch.bfloat16 and has_bfloat16_products())


class Projection:
    """The products with one head, without gradients. Sums are in float32, or float64 for a float64 head.

    Args:
        head: (C, H), contiguous rows.
        bias: (C,) or None.
        products: the dtype that hidden states, head and gradients of logits are rounded to before a product.
        logits_dtype: of logits and their gradients.
    """

    def __init__(self, head: Tensor, bias: Tensor | None, products: torch.dtype, logits_dtype: torch.dtype) -> None:
        self.products, self.logits_dtype = products, logits_dtype
        self.accumulator = torch.float64 if products == torch.float64 else torch.float32
        # Whether one product makes all logits. Results of another dtype than the inputs' are at hand on CUDA only.
        self._direct = head.is_cuda or (products == logits_dtype and _has_products(products))
        self._head = head.to(products) if self._direct else head
        self._bias = None if bias is None else bias.to(logits_dtype if self._direct else self.accumulator)

    def rows(self, hidden: Tensor) -> Tensor:
        """Rows of hidden states (m, H) as the products take them."""
        rounded = hidden.to(self.products)
        return rounded if self._direct else rounded.to(self.accumulator)

    def logits(self, rows: Tensor, out: Tensor) -> None:
        """out (m, C) = rows @ head^T + bias."""
        if self._direct:
            head, kind = self._head.t(), self._result_of(self.logits_dtype)
            if self._bias is None:
                torch.mm(rows, head, out=out, **kind)
            else:
                torch.addmm(self._bias, rows, head, out=out, **kind)
            return
        for columns, tile in self._tiles():
            part = product(rows, tile.t())
            if self._bias is not None:
                part += self._bias[columns]
            out[:, columns] = part

    def as_input(self, grad: Tensor) -> Tensor:
        """The gradient of the logits (m, C) as both products below take it: rounded once for the two, or by tiles."""
        return grad.to(self.products) if self._direct else grad

    def grad_rows(self, grad: Tensor) -> Tensor:
        """The gradient of the rows (m, H), from that of the logits (m, C) `as_input`."""
        if self._direct:
            return grad @ self._head
        parts = (product(self._rounded(grad[:, columns]), tile) for columns, tile in self._tiles())
        total = next(parts)
        for part in parts:
            total += part
        return total

    def add_grad_head(self, grad: Tensor, rows: Tensor, total: Tensor, first: bool) -> None:
        """total (C, H) += grad^T @ rows in the accumulation dtype, of a grad `as_input`; = if it is the `first`."""
        if self._direct and grad.is_cpu and self.products != total.dtype:
            part = grad.t() @ rows
            total.copy_(part) if first else total.add_(part)
            return
        if self._direct:
            torch.addmm(total, grad.t(), rows, beta=0 if first else 1, out=total, **self._result_of(total.dtype))
            return
        for columns in self._columns():
            part = product_of_transposed(self._rounded(grad[:, columns]), rows)
            total[columns].copy_(part) if first else total[columns].add_(part)

    def _result_of(self, dtype: torch.dtype) -> dict[str, Any]:
        """The keyword of a product whose result has another dtype than its inputs."""
        return {} if dtype == self.products else {"out_dtype": dtype}

    def _rounded(self, grad: Tensor) -> Tensor:
        """Gradients as a product of the inputs' dtype would read them."""
        return grad.to(self.products).to(self.accumulator)

    def _columns(self) -> Iterator[slice]:
        C, H = self._head.shape
        tile = max(TILE_ROWS, TILE_BYTES // (4 * max(H, 1)))
        return (slice(begin, min(begin + tile, C)) for begin in range(0, C, tile))

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """The head in float32, tile by tile, because all of it would take as much memory again."""
        for columns in self._columns():
            yield columns, self._head[columns].to(self.products).to(self.accumulator)
