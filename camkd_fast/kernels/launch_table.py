"""The launch table: block sizes and warps of every kernel by shape, with reasons.

There is no autotuning: the first batch of a shape costs no more than the next, and the offline compile test can
enumerate every shipped configuration. Registers per thread are counted as (live fp32 tiles) * (elements per thread).
"""

from __future__ import annotations

from typing import NamedTuple

# One 128-bit access per thread: the widest access, needed to reach DRAM bandwidth.
ACCESS_BYTES = 16
# Most elements in a row of all K + 1 tensors, padded, for rows to stay on chip. Beyond it the live tiles leave room
# for one program per SM, which idles while it loads; a second read, served by L2, is cheaper.
ON_CHIP_ELEMENTS = 16384
# Most columns of such rows for formulas beyond the paper's. JSD spills at 8192, with 8 warps as with 16.
ON_CHIP_BEYOND = 4096
# An explicit limit: without one ptxas may spill rather than use another register, to keep occupancy.
MOST_REGISTERS = 255
# With more teachers the compiler, which issues their loads together, runs out of registers and spills.
ON_CHIP_TEACHERS = 6


class Launch(NamedTuple):
    """BLOCK_N rows and BLOCK_C columns per program, or per iteration if the program loops."""

    BLOCK_N: int
    BLOCK_C: int
    num_warps: int


def _power_of_2(value: int) -> int:
    """Smallest power of two >= value."""
    return 1 << max(value - 1, 0).bit_length()


def on_chip(K: int, C: int, beyond: bool = False) -> bool:
    """Whether the row loss of K teachers keeps whole rows on chip.

    Args:
        beyond: the formula is beyond the paper's.
    """
    fits = K <= ON_CHIP_TEACHERS and (K + 1) * _power_of_2(C) <= ON_CHIP_ELEMENTS
    return fits and not (beyond and C > ON_CHIP_BEYOND)


def access_width(itemsize: int, ALIGN: int) -> int:
    """Elements per access: 128 bits of the widest dtype if rows are aligned, fewer if not."""
    return min(ACCESS_BYTES // itemsize, ALIGN)


def _register_limit(K: int, num_warps: int, more: bool) -> int | None:
    """No limit for up to 3 teachers: ptxas uses 70 to 80 registers, and more would avoid no spill.

    Args:
        more: two labels, or a formula beyond the paper's, need more registers.
    """
    return None if K <= 3 and not more else min(MOST_REGISTERS, 65536 // (32 * num_warps))


class RowLaunch(NamedTuple):
    """BLOCK_N rows per program, BLOCK_C columns at a time; `maxnreg` is None for ptxas's choice."""

    BLOCK_N: int
    BLOCK_C: int
    num_warps: int
    maxnreg: int | None


def onchip_launch(K: int, C: int, itemsize: int, ALIGN: int, more: bool = False) -> RowLaunch:
    """Row loss with rows on chip: 8 elements of each tensor per thread, one 128-bit load in 16-bit types.

    Args:
        more: two labels, or a formula beyond the paper's. Beyond 2048 columns a thread has twice the elements then, and
            twice the registers: with half of them JSD spills.
    """
    BLOCK_C = _power_of_2(max(C, 16))
    if BLOCK_C > 1024:
        num_warps = BLOCK_C // (512 if more and BLOCK_C > 2048 else 256)
        return RowLaunch(1, BLOCK_C, num_warps, _register_limit(K, num_warps, more))
    # Up to 256 columns a warp owns whole rows, so reductions are shuffles without a barrier. Narrow rows share a warp;
    # a thread works on at most 2 of them, since a row takes 3 registers per teacher.
    BLOCK_N = max(256 // BLOCK_C, min(1024 // BLOCK_C, 4))
    num_warps = min(BLOCK_N * BLOCK_C // (32 * access_width(itemsize, ALIGN)), 4)
    # Rows of up to 128 columns finish before occupancy matters.
    maxnreg = MOST_REGISTERS if BLOCK_C <= 128 else _register_limit(K, num_warps, more)
    return RowLaunch(BLOCK_N, BLOCK_C, num_warps, maxnreg)


class StreamingLaunch(NamedTuple):
    """One row per program, BLOCK_C columns and GROUP teachers per iteration; a lane is VEC columns."""

    BLOCK_C: int
    VEC: int
    GROUP: int
    num_warps: int
    maxnreg: int | None


def streaming_launch(
    K: int, C: int, itemsize: int, ALIGN: int, two_labels: bool = False, beyond: bool = False
) -> StreamingLaunch:
    """Row loss with rows in column blocks: one access per thread, tensor and iteration, and one lane of statistics.

    A lane holds 3 + 5 GROUP running numbers, and 4 GROUP registers of loads are in flight. 8 teachers fill the 128
    registers that each of 512 threads may use. More teachers need 7 K registers for their totals, hence half the
    threads and groups of 2, each of which reads the student once; groups of 4 spill. Programs are large rather than
    numerous: with fewer rows in flight, more of a row remains in L2 for the second read. Narrow rows use no more warps
    than they can feed.

    Formulas beyond the paper's have more running numbers and totals: half the threads and groups of 4, and with more
    than 8 teachers half as wide accesses. 16 teachers with every option at once spill 40 bytes nevertheless.

    Args:
        beyond: the formula is beyond the paper's.
    """
    # Odd widths are read element by element, 4 per thread; the columns of a lane are then BLOCK_C / 4 elements distant.
    VEC = 4 if ALIGN == 1 else access_width(itemsize, ALIGN)
    GROUP, widest = (8, 16) if K <= 8 else (2, 8)
    if beyond:
        GROUP, widest = min(GROUP, 4), 8
        VEC = max(VEC // 2, 1) if K > 8 else VEC
    num_warps = max(1, min(_power_of_2(C) // (32 * VEC), widest))
    return StreamingLaunch(
        32 * num_warps * VEC, VEC, GROUP, num_warps, _register_limit(K, num_warps, two_labels or beyond)
    )


def confidence_launch(K: int, C: int, itemsize: int, ALIGN: int, two_labels: bool = False) -> RowLaunch:
    """Confidence weights: statistics only, so one geometry works for any C; narrow rows share a program.

    4 warps, one access per thread and iteration; a lane holds 3 running numbers of one teacher at a time.
    """
    tile = 128 * access_width(itemsize, ALIGN)
    BLOCK_C = min(_power_of_2(max(C, 16)), tile)
    return RowLaunch(tile // BLOCK_C, BLOCK_C, 4, _register_limit(K, 4, two_labels))


def elementwise_launch(C: int, itemsize: int) -> Launch:
    """Kernels without a reduction: two 128-bit accesses per thread and tensor keep enough bytes in flight."""
    tile = 2 * 128 * ACCESS_BYTES // itemsize
    BLOCK_C = min(_power_of_2(max(C, 16)), tile)
    return Launch(tile // BLOCK_C, BLOCK_C, 4)


# Most rows that a mean is computed over by these kernels. For more PyTorch's parallel reduction is faster.
BATCH_ROWS = 65536
# Items per iteration and warps of the one program that counts labels or adds up rows in a launch of its own.
BATCH_KERNEL = 1024, 4


class BatchLaunch(NamedTuple):
    """What the launch of the rows does for the means over them. See batch_mean.py."""

    INVERSE: str  # 1 / number of valid rows: "here" every program counts all labels, "before" a launch has; "" no mean
    ADDS_UP: bool  # the last program adds up the rows; else another launch does, or nobody
    BLOCK_B: int  # labels or rows per iteration of one program


def batch_launch(N: int, programs: int, num_warps: int) -> BatchLaunch:
    """For a mean over N rows.

    Labels are read from L2, by every program: up to 16 MB in all take about as long as the launch of a kernel, and up
    to 2048 labels a program waits for a few accesses. The last program to end has the GPU to itself, so more than 128
    rows per thread are left to a launch that does not have as few threads.
    """
    counts = N <= 2048 and N * programs <= 2**21
    threads = 32 * num_warps
    rows_per_thread = -(-N // threads)
    return BatchLaunch("here" if counts else "before", ADDS_UP=rows_per_thread <= 128, BLOCK_B=4 * threads)


def feature_launch(itemsize: int) -> tuple[int, int]:
    """BLOCK_M and num_warps of the feature loss: one program per sample loops over its M values.

    Two 128-bit accesses per thread, tensor and iteration.
    """
    return 2 * 256 * ACCESS_BYTES // itemsize, 8


# Items per iteration of the one program that adds up the feature loss: 8 per thread of the default 4 warps.
SUM_BLOCK = 1024
