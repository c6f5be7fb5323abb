"""Which rows of the linear loss are computed together: rows that count, with the same teachers, in chunks."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

# Rows of a chunk on a GPU: one wave of tiles of the gradient of the hidden states; twice as many where they are narrow.
GPU_ROWS, NARROW = 2048, 1024
# On a CPU the logits of a chunk are read again soonest when they are few, and products are at speed from here on.
CPU_ROWS = 256
LEAST_ROWS = 512  # that a byte budget leaves, since products of fewer rows would read the heads in vain
SMALL_GROUP = 256  # a product of fewer rows takes as long


class RowGroup(NamedTuple):
    """Rows that have the same teachers."""

    teachers: tuple[int, ...]
    rows: Tensor | None  # (M,) int64; None for all N rows in order
    size: int  # M


def valid_rows(labels: Tensor, ignore_index: int, num_valid: int | None) -> tuple[Tensor | None, int]:
    """The rows whose label is not `ignore_index`, in order, and their number; None if those are all.

    Args:
        num_valid: at least the number of such rows, if the caller knows it. Then nothing is read from a GPU, and up to
            so many rows are returned, the valid ones first.
    """
    kept = labels != ignore_index
    if num_valid is not None:
        if num_valid >= len(labels):
            return None, len(labels)
        return (~kept).to(torch.uint8).argsort(stable=True)[:num_valid], num_valid
    rows = kept.nonzero().squeeze(-1)
    return (None if len(rows) == len(labels) else rows), len(rows)


def row_groups(rows: Tensor | None, count: int, weights: Tensor | None, K: int, may_read: bool) -> list[RowGroup]:
    """Groups of rows by the teachers that have a weight there, so that the others are not computed.

    Args:
        rows, count: as `valid_rows` returns them.
        weights: (K, N) given ones; None if every teacher is needed.
        may_read: whether the groups may depend on values on a device.
    """
    every = RowGroup(tuple(range(K)), rows, count)
    if weights is None or not may_read or count == 0:
        return [every]
    used = (weights != 0) if rows is None else (weights[:, rows] != 0)
    if used.all():
        return [every]
    codes = (used.to(torch.int64) << torch.arange(K, device=used.device).unsqueeze(-1)).sum(0)
    found, counts = torch.unique(codes, return_counts=True)
    groups = [(code, n) for code, n in zip(found.tolist(), counts.tolist(), strict=True)]

    def cost(n: int, teachers: int) -> int:  # in products: three of the student, one per teacher
        return max(n, SMALL_GROUP) * (3 + teachers)

    if sum(cost(n, code.bit_count()) for code, n in groups) >= cost(count, K):
        return [every]
    order = codes.argsort(stable=True)
    order = order if rows is None else rows[order]
    result, begin = [], 0
    for code, n in groups:
        # A row without teachers has a loss too; there the weight of the first one is 0.
        teachers = tuple(k for k in range(K) if code >> k & 1) or (0,)
        result.append(RowGroup(teachers, None if len(groups) == 1 and rows is None else order[begin : begin + n], n))
        begin += n
    return result


def chunks(count: int, row_bytes: int, most_bytes: float, most_rows: int | None, H: int, on_gpu: bool) -> list[slice]:
    """`count` rows in equal parts.

    Args:
        row_bytes: of the logits of a row, of student and teachers.
        most_bytes: of the logits of a chunk, as long as that leaves LEAST_ROWS.
        most_rows: the caller's limit instead.
        H: width of the student's hidden states.
    """
    if most_rows is None:
        most_rows = (GPU_ROWS if H > NARROW else 2 * GPU_ROWS) if on_gpu else CPU_ROWS
        if most_bytes < most_rows * row_bytes:
            most_rows = min(most_rows, max(int(most_bytes) // row_bytes, LEAST_ROWS if on_gpu else 1))
    parts = -(-count // most_rows)
    bounds = [count * i // parts for i in range(parts + 1)] if parts else []
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]
