"""The launch table: block sizes and warps of every kernel as a function of shape, with the reasons.

No autotuning: the first batch of a shape costs what the others do, and the offline compile test can enumerate every
shipped configuration. Registers are counted per thread as (live tiles) * (elements per thread), a tile being fp32.
"""

from __future__ import annotations

from typing import NamedTuple

# One 128-bit access per thread: the widest there is, and what DRAM bandwidth needs.
ACCESS_BYTES = 16
# Elements of a row of all K + 1 tensors, padded, up to which rows stay on chip: beyond, the tiles that are live at once
# leave room for a single program per SM, with nothing to do while it loads; a second read, which L2 serves, is cheaper.
ON_CHIP_ELEMENTS = 16384
# Named, ptxas keeps to it; left alone, it may prefer a spill to a register more, for the sake of occupancy.
MOST_REGISTERS = 255
# With more teachers the compiler, which issues their loads together, runs out of registers and spills.
ON_CHIP_TEACHERS = 6


class Launch(NamedTuple):
    """Launch geometry; BLOCK_C columns of BLOCK_N rows per program, per step of its loop if it has one."""

    BLOCK_N: int
    BLOCK_C: int
    num_warps: int


def _power_of_2(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def on_chip(K: int, C: int) -> bool:
    """Is the row loss of K teachers computed with whole rows on chip?"""
    return K <= ON_CHIP_TEACHERS and (K + 1) * _power_of_2(C) <= ON_CHIP_ELEMENTS


def access_width(itemsize: int, ALIGN: int) -> int:
    """Elements of one access, 128 bits where rows are aligned; of the widest dtype when they differ."""
    return min(ACCESS_BYTES // itemsize, ALIGN)


def _register_limit(K: int, num_warps: int) -> int | None:
    """ptxas chooses well for up to 3 teachers: 70 to 80 registers per thread where 110 would avoid nothing."""
    return None if K <= 3 else min(MOST_REGISTERS, 65536 // (32 * num_warps))


class RowLaunch(NamedTuple):
    """BLOCK_N rows per program, BLOCK_C columns of them at a time, and the register limit if it is named."""

    BLOCK_N: int
    BLOCK_C: int
    num_warps: int
    maxnreg: int | None


def onchip_launch(K: int, C: int, itemsize: int, ALIGN: int) -> RowLaunch:
    """Row loss, rows on chip: 8 elements of each tensor per thread, one 128-bit load in 16-bit types."""
    BLOCK_C = _power_of_2(max(C, 16))
    if BLOCK_C > 1024:
        num_warps = BLOCK_C // 256
        return RowLaunch(1, BLOCK_C, num_warps, _register_limit(K, num_warps))
    # A warp owns whole rows up to 256 columns: their reductions are shuffles without a barrier. Narrow rows share it,
    # few enough that a thread works on 2 at most however narrow its loads are: a row takes 3 registers per teacher.
    BLOCK_N = max(256 // BLOCK_C, min(1024 // BLOCK_C, 4))
    num_warps = min(BLOCK_N * BLOCK_C // (32 * access_width(itemsize, ALIGN)), 4)
    # Rows of up to 128 columns are over before occupancy matters.
    maxnreg = MOST_REGISTERS if BLOCK_C <= 128 else _register_limit(K, num_warps)
    return RowLaunch(BLOCK_N, BLOCK_C, num_warps, maxnreg)


class StreamingLaunch(NamedTuple):
    """One row per program in steps of BLOCK_C columns, GROUP teachers at a time; VEC columns are a lane."""

    BLOCK_C: int
    VEC: int
    GROUP: int
    num_warps: int
    maxnreg: int | None


def streaming_launch(K: int, C: int, itemsize: int, ALIGN: int) -> StreamingLaunch:
    """Row loss, rows in column blocks: one access per thread, tensor and step, and one lane of statistics.

    A lane holds 3 + 5 GROUP running numbers, and 4 GROUP registers of loads are in flight. 8 teachers fill the 128
    registers that each of 512 threads may have. More need 7 K registers for their totals, so half the threads, and
    groups of 2, which read the student once each: with groups of 4 ptxas spills. Large programs rather than many: the
    fewer rows are under way at once, the more of a row is still in L2 when it is read again. Narrow rows take no more
    warps than they can feed.
    """
    # An odd width is read by the element, 4 per thread: its lanes are made of columns that lie BLOCK_C / 4 apart.
    VEC = 4 if ALIGN == 1 else access_width(itemsize, ALIGN)
    GROUP, widest = (8, 16) if K <= 8 else (2, 8)
    num_warps = max(1, min(_power_of_2(C) // (32 * VEC), widest))
    return StreamingLaunch(32 * num_warps * VEC, VEC, GROUP, num_warps, _register_limit(K, num_warps))


def confidence_launch(K: int, C: int, itemsize: int, ALIGN: int) -> RowLaunch:
    """Confidence weights: statistics only, so one geometry serves any C; narrow rows share a program.

    4 warps and one access per thread and step: a lane holds 3 running numbers of one teacher at a time.
    """
    tile = 128 * access_width(itemsize, ALIGN)
    BLOCK_C = min(_power_of_2(max(C, 16)), tile)
    return RowLaunch(tile // BLOCK_C, BLOCK_C, 4, _register_limit(K, 4))


def elementwise_launch(C: int, itemsize: int) -> Launch:
    """Kernels without a reduction: two 128-bit accesses per thread and tensor keep enough bytes in flight."""
    tile = 2 * 128 * ACCESS_BYTES // itemsize
    BLOCK_C = min(_power_of_2(max(C, 16)), tile)
    return Launch(tile // BLOCK_C, BLOCK_C, 4)


# Rows that one program adds up: 0.5 MB of labels. For more of them PyTorch's many programs outweigh its launches.
BATCH_ROWS = 65536


class BatchLaunch(NamedTuple):
    """BLOCK_N rows per step of a program that walks the whole batch."""

    BLOCK_N: int
    num_warps: int


def batch_launch(N: int) -> BatchLaunch | None:
    """Counts and sums over the rows of a batch by single programs; None where there are too many rows for that."""
    if N > BATCH_ROWS:
        return None
    return BatchLaunch(128, 1) if N <= 128 else BatchLaunch(1024, 4)


def feature_launch(itemsize: int) -> Launch:
    """Feature error: one program per sample walks its M values; 8 warps, two 128-bit accesses per thread and step."""
    return Launch(1, 2 * 256 * ACCESS_BYTES // itemsize, 8)
