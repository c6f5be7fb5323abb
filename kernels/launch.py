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
# With more teachers the compiler, which issues their loads together, runs out of registers and spills.
ON_CHIP_TEACHERS = 8


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


def onchip_launch(C: int) -> Launch:
    """Row loss, rows on chip: 8 elements of each tensor per thread, one 128-bit load in 16-bit types."""
    BLOCK_C = _power_of_2(max(C, 16))
    if BLOCK_C <= 1024:
        # Up to 256 columns a warp owns whole rows: their reductions are shuffles without a barrier. At most 2 rows per
        # thread, however narrow its loads: a row takes 3 registers per teacher.
        return Launch(max(256 // BLOCK_C, min(1024 // BLOCK_C, 4)), BLOCK_C, 4)
    return Launch(1, BLOCK_C, BLOCK_C // 256)


def vector_width(itemsize: int) -> int:
    """Elements of one 128-bit access; of the widest dtype when they differ."""
    return ACCESS_BYTES // itemsize


class StreamingLaunch(NamedTuple):
    """One row per program in steps of BLOCK_C columns, GROUP teachers at a time."""

    BLOCK_C: int
    GROUP: int
    num_warps: int


def streaming_launch(K: int, C: int, itemsize: int) -> StreamingLaunch:
    """Row loss, rows in column blocks: one 128-bit access per thread, tensor and step, and one lane of statistics.

    A lane holds 3 + 5 GROUP running numbers, and 4 GROUP registers of loads are in flight. 8 teachers fill the 128
    registers that each of 512 threads may have. More need 7 K registers for their totals, so half the threads, and
    groups of 4, which read the student once each. Large programs rather than many: the fewer rows are under way at
    once, the more of a row is still in L2 when it is read again. Narrow rows take no more warps than they can feed.
    """
    GROUP, widest = (8, 16) if K <= 8 else (4, 8)
    num_warps = max(1, min(_power_of_2(C) // (32 * vector_width(itemsize)), widest))
    return StreamingLaunch(32 * num_warps * vector_width(itemsize), GROUP, num_warps)


def confidence_launch(C: int, itemsize: int) -> Launch:
    """Confidence weights: statistics only, so one geometry serves any C; narrow rows share a program.

    4 warps and one 128-bit access per thread and step: a lane holds 3 running numbers of one teacher at a time.
    """
    tile = 128 * vector_width(itemsize)
    BLOCK_C = min(_power_of_2(max(C, 16)), tile)
    return Launch(tile // BLOCK_C, BLOCK_C, 4)


def elementwise_launch(C: int, itemsize: int) -> Launch:
    """Kernels without a reduction: two 128-bit accesses per thread and tensor keep enough bytes in flight."""
    tile = 2 * 128 * vector_width(itemsize)
    BLOCK_C = min(_power_of_2(max(C, 16)), tile)
    return Launch(tile // BLOCK_C, BLOCK_C, 4)


def feature_launch(itemsize: int) -> Launch:
    """Feature error: one program per sample walks its M values; 8 warps, two 128-bit accesses per thread and step."""
    return Launch(1, 2 * 256 * vector_width(itemsize), 8)
