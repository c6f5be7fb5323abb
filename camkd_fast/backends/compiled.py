"""Tensors as the compiled module takes them: addresses, strides and dtype codes. Shared by `cpu` and `cuda`.

Importing this module fails if `_C` was not built.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import _C  # after torch, whose OpenMP runtime it shares
from ..losses.formula import WEIGHTINGS, Formula
from .contract import COMPILED_DTYPES, MAX_TEACHERS, TEMPERATURE_POWERS

# Constants that C++ and Python both spell. A difference would be a wrong result, so it is refused on import.
for _name, _ours, _theirs in (
    ("most teachers", MAX_TEACHERS, _C.MAX_TEACHERS),
    ("temperature powers", TEMPERATURE_POWERS, _C.TEMPERATURE_POWERS),
    ("weightings", WEIGHTINGS, _C.WEIGHTINGS),
    ("dtypes", tuple(str(dtype).removeprefix("torch.") for dtype in COMPILED_DTYPES), _C.DTYPES),
    ("fields of Formula", Formula._fields, _C.FORMULA_FIELDS),
):
    if _ours != _theirs:
        raise ImportError(f"camkd_fast._C is of another version: {_name} are {_theirs}, expected {_ours}")

DTYPE_CODES = {dtype: code for code, dtype in enumerate(COMPILED_DTYPES)}

Matrix = tuple[int, int, int, int]


def matrix(logits: Tensor) -> Matrix:
    strides = logits.stride()
    return logits.data_ptr(), strides[0], strides[-2], DTYPE_CODES[logits.dtype]


def shape_of(logits: Tensor) -> tuple[int, int, int]:
    """N, C and the number of rows per outer stride, of (N, C) or (B, S, C) logits."""
    shape = logits.shape
    S = shape[-2]
    return (S if len(shape) == 2 else shape[0] * S), shape[-1], max(S, 1)


def weights_of(formula: Formula) -> tuple[int, int, int]:
    """Address and strides of given weights (K, N); zeros for a named weighting."""
    weights = formula.weighting
    if isinstance(weights, Tensor):
        return weights.data_ptr(), weights.stride(0), weights.stride(1)
    return 0, 0, 0


def pairs_of(
    student: Sequence[Tensor], teachers: Sequence[Tensor]
) -> tuple[int, list[int], list[Matrix], list[Matrix]]:
    """N, the K widths, and both sides of K pairs of (N, M_k) matrices."""
    widths = [r.shape[1] for r in student]
    return student[0].shape[0], widths, [matrix(r) for r in student], [matrix(f) for f in teachers]


def address_of(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
