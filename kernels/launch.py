"""The launch table: block sizes and warps of every kernel as a function of shape, with the reasons.

No autotuning: the first batch of a shape costs what the others do, and the offline compile test can enumerate every
shipped configuration. Registers are counted per thread as (live tiles) * (elements per thread), a tile being fp32.
"""

from __future__ import annotations

from typing import NamedTuple

# One 128-bit access per thread: the widest there is, and what DRAM bandwidth needs.
ACCESS_BYTES = 16
# Wider rows are streamed: at 16 elements per thread a whole row of more columns would need over 512 threads.
ON_CHIP_COLUMNS = 8192


class Launch(NamedTuple):
    """Launch geometry; BLOCK_C columns of BLOCK_N rows per program, per step of its loop if it has one."""

    BLOCK_N: int
    BLOCK_C: int
    num_warps: int


def _power_of_2(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def on_chip(C: int) -> bool:
    """Does a whole row fit in one program? About five tiles live at once whatever K is (see `row_loss_onchip`)."""
    return C <= ON_CHIP_COLUMNS


def onchip_launch(C: int) -> Launch:
    """Row loss, rows on chip. Five live tiles of 8 or 16 elements are 40 or 80 registers of each thread."""
    BLOCK_C = _power_of_2(max(C, 16))
    if BLOCK_C <= 1024:
        # 8 elements per thread: one 128-bit load in 16-bit types. Rows of up to 256 columns stay inside one warp, so
        # that their reductions are shuffles without a barrier.
        return Launch(1024 // BLOCK_C, BLOCK_C, 4)
    # 16 elements per thread: fewer threads meet at the barriers of each row's reductions.
    return Launch(1, BLOCK_C, BLOCK_C // 512)


def vector_width(itemsize: int) -> int:
    """Elements of one 128-bit access; of the widest dtype when they differ."""
    return ACCESS_BYTES // itemsize


def streaming_launch(K: int, itemsize: int) -> Launch:
    """Row loss, rows in column blocks: one 128-bit access per thread, tensor and step, and one lane of statistics.

    A lane holds 3 + 4 K running numbers. 512 threads may have 128 registers each: enough for K = 8 with the loads of a
    step in flight; K = 16 needs about 200, hence half the threads. Large programs rather than many: the fewer rows are
    under way at once, the more of a row is still in L2 when it is read again.
    """
    num_warps = 16 if K <= 8 else 8
    return Launch(1, 32 * num_warps * vector_width(itemsize), num_warps)


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
