"""Tensors as the compiled module takes them: addresses, strides and dtype codes. Shared by `cpu` and `cuda`.

Importing this module fails if `_C` was not built.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import _C  # after torch, whose OpenMP runtime it shares
from ..losses.divergence import DIVERGENCES
from ..losses.formula import WEIGHTINGS, Formula
from . import contract
from .contract import COMPILED_DTYPES, MAX_TEACHERS, TEMPERATURE_POWERS, SecondLabels, new_row_sums, row_stats_count
from .feature_maps import map_pair

# What a kernel does with rows of which some of the columns are here, by code (csrc/ops.h).
_SHARDS = ("none", "sums", "mixtures", "results")


def _in_order(**names: int) -> tuple[str | None, ...]:
    """The names by their numbers, which are 0, 1, 2, ... in any order."""
    by_number = {number: name for name, number in names.items()}
    return tuple(by_number.get(i) for i in range(len(names)))


_ROW_SUMS = _in_order(
    max=contract.MAX,
    sumT=contract.SUM_T,
    sum1=contract.SUM_1,
    cross=contract.CROSS,
    plogp=contract.PLOGP,
    label=contract.LABEL,
    center=contract.CENTER,
)
_ROW_STATS = _in_order(  # for one teacher
    loss=contract.LOSS,
    hard=contract.HARD,
    soft=contract.SOFT,
    divergence=contract.PER_TEACHER + contract.DIVERGENCE_BLOCK,
    teacher_ce=contract.PER_TEACHER + contract.TEACHER_CE_BLOCK,
    weight=contract.PER_TEACHER + contract.WEIGHT_BLOCK,
    entropy=row_stats_count(1),
)

# Constants that C++ and Python both spell. A difference would be a wrong result, so it is refused on import.
for _name, _ours, _theirs in (
    ("most teachers", MAX_TEACHERS, _C.MAX_TEACHERS),
    ("temperature powers", TEMPERATURE_POWERS, _C.TEMPERATURE_POWERS),
    ("weightings", WEIGHTINGS, _C.WEIGHTINGS),
    ("divergences", DIVERGENCES, _C.DIVERGENCES),
    ("sums of a row", _ROW_SUMS, _C.ROW_SUMS),
    ("rows of row_stats", _ROW_STATS, _C.ROW_STATS),
    ("steps of a shard", _SHARDS, _C.SHARDS),
    ("dtypes", tuple(str(dtype).removeprefix("torch.") for dtype in COMPILED_DTYPES), _C.DTYPES),
    ("fields of Formula", Formula._fields, _C.FORMULA_FIELDS),
):
    if _ours != _theirs:
        raise ImportError(f"camkd_fast._C is of another version: {_name} are {_theirs}, expected {_ours}")

DTYPE_CODES = {dtype: code for code, dtype in enumerate(COMPILED_DTYPES)}

Matrix = tuple[int, int, int, int]
Shard = tuple[int, int]  # code of _SHARDS, address of the sums
CompiledMap = tuple[int, int, int, int, int]  # address, strides of n, p and q, dtype code
CompiledPair = tuple[tuple[int, int], CompiledMap, CompiledMap]  # (P, Q), student, teacher
NO_WEIGHTS = (0, 0, 0)
NO_SHARD: Shard = (0, 0)


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
    return given_weights(formula.weighting) if isinstance(formula.weighting, Tensor) else NO_WEIGHTS


def new_sums(whole: Tensor | None, K: int, target: Tensor) -> tuple[Tensor, Shard]:
    """`new_row_sums`, and what a kernel is to write there."""
    sums = new_row_sums(whole, K, target)
    return sums, (_SHARDS.index("sums" if whole is None else "mixtures"), sums.data_ptr())


def shard_of(sums: Tensor) -> Shard:
    """For the results of rows with these sums, contiguous."""
    return _SHARDS.index("results"), sums.data_ptr()


def second_addresses(second: SecondLabels | None) -> tuple[int, int]:
    """Addresses of second labels; zeros for rows of one label."""
    return (0, 0) if second is None else (second.target.data_ptr(), second.mix.data_ptr())


def map_pairs(student: Sequence[Tensor], teachers: Sequence[Tensor]) -> tuple[list[CompiledPair], list[Tensor]]:
    """K pairs of maps (N, ...), and the copies among them, which must live until the call."""
    pairs: list[CompiledPair] = []
    copies: list[Tensor] = []
    for given in zip(student, teachers, strict=True):
        r, f, P, Q, student_strides, teacher_strides = map_pair(*given)
        copies += [used for used, own in zip((r, f), given, strict=True) if used is not own]
        mine = r.data_ptr(), *student_strides, DTYPE_CODES[r.dtype]
        pairs.append(((P, Q), mine, (f.data_ptr(), *teacher_strides, DTYPE_CODES[f.dtype])))
    return pairs, copies


def given_weights(weights: Tensor) -> tuple[int, int, int]:
    """Address and strides of weights (K, N)."""
    return weights.data_ptr(), weights.stride(0), weights.stride(1)


def address_of(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
