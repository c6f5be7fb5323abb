"""`python -m benchmarks.row_kernel`: how near the CUDA kernel of the logit loss comes to the copy bandwidth of a GPU.

Calls follow each other without a wait, so that the kernel's time counts and the host's does not. The share of copy is
the time in which a copy moves as many bytes as the loss must read and write, over the time of a call. K = 3, T = 4.

`--geometries` also measures every geometry that fits a row (warps of a block, vectors in each thread's buffer, rows in
flight and their order) beside the one that csrc/cuda/launch_table.h chooses, whose costs were fitted on an H200.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import timer
from benchmarks.environment import describe
from benchmarks.shapes import BF16, F32, Shape
from camkd_fast import _C, camkd_loss_and_grad

SIZES = (
    (8192, 128256, BF16), (4096, 32000, BF16), (16384, 1000, BF16), (4096, 151936, BF16), (2048, 262144, BF16),
    (16384, 4096, BF16), (8192, 10000, BF16), (16384, 1000, F32), (4096, 32000, F32), (4096, 128256, F32),
)  # fmt: skip
ROUNDS = 7
WARPS, SLOTS, ROWS, GRADIENTS = range(1, 19), range(1, 9), range(2, 5), range(1, 3)  # that are tried
BEST = 5  # geometries that are printed


@dataclass(frozen=True)
class Geometry:
    """How the kernel runs a row; `warps` of a block hold rows, and each thread buffers `slots` vectors of 16 bytes.

    A pipelined warp has `rows` in flight, and writes the gradients of `gradients` of them before it sums up others.
    """

    warp_per_row: bool
    pipelined: bool
    warps: int
    slots: int
    blocks: int  # of a row
    rows: int
    gradients: int

    def __str__(self) -> str:
        row = "a warp" if self.warp_per_row else f"{self.blocks} block(s)"
        text = f"{row} a row, {self.warps} warps a block, {self.slots} slots, {self.rows} rows in flight"
        return f"{text}, {self.gradients} gradient(s) at once" if self.pipelined else text


@contextmanager
def trial(warps: int = 0, slots: int = 0, rows: int = 0, gradients: int = 0) -> Iterator[None]:
    """Launches with this geometry, where it fits the rows; 0: as the launch table says."""
    _C.cuda_try_geometry(warps, slots, rows, gradients)
    try:
        yield
    finally:
        _C.cuda_try_geometry(0, 0, 0, 0)


def trial_of(geometry: Geometry) -> AbstractContextManager[None]:
    """Launches with a geometry that was found."""
    pipeline = (geometry.rows, geometry.gradients) if geometry.pipelined else (0, 0)
    return trial(geometry.warps, geometry.slots, *pipeline)


def seconds(call: Callable[[], object], count: int) -> float:
    """Seconds of a call among `count` calls without a wait between them."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(300_000)  # the first calls are enqueued meanwhile
    start.record()
    for _ in range(count):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / count / 1e3


def geometries(call: Callable[[], object]) -> list[Geometry]:
    """All that fit the rows of a call, each of which it runs once."""
    found = {}
    for warps, slots, rows, gradients in itertools.product(WARPS, SLOTS, ROWS, GRADIENTS):
        with trial(warps, slots, rows, gradients):
            call()
            used = Geometry(*_C.cuda_tried_geometry())
        if (used.warp_per_row or used.pipelined) and used.warps == warps:
            found[used] = None
    return list(found)


def medians(call: Callable[[], object], count: int, wanted: Sequence[Geometry | None]) -> list[float]:
    """Median seconds of a call for each geometry (None: the table's), over rounds that time all of them."""
    times: list[list[float]] = [[] for _ in wanted]
    for _ in range(ROUNDS):
        for geometry, of in zip(wanted, times, strict=True):
            with trial_of(geometry) if geometry else nullcontext():
                of.append(seconds(call, count))
    return [statistics.median(of) for of in times]


def measure(N: int, C: int, dtype: torch.dtype, copy: float, every: bool) -> dict[str, Any]:
    """A row of the results; `copy` is in bytes per second."""
    device = torch.device("cuda")
    shape = Shape(N, C, 3, dtype)
    batch = shape.batch(device)
    bytes_moved = 5 * N * C * dtype.itemsize

    def call() -> None:
        camkd_loss_and_grad(*batch, backend="cuda")

    for _ in range(5):
        call()
    others = geometries(call) if every else []
    took, *rest = medians(call, max(5, min(60, int(8e-3 * copy / bytes_moved))), [None, *others])
    row: dict[str, Any] = {"N": N, "C": C, "dtype": str(dtype), "us": 1e6 * took}
    row["share_of_copy"] = bytes_moved / took / copy
    print(f"{shape}: {1e6 * took:.0f} us, {row['share_of_copy']:.1%} of copy", flush=True)
    if every:
        ranked = sorted(zip(rest, others, strict=True), key=lambda pair: pair[0])
        row["geometries"] = [{**vars(geometry), "us": 1e6 * time} for time, geometry in ranked]
        for time, geometry in ranked[:BEST]:
            print(f"    {geometry}: {1e6 * time:.0f} us, {took / time:.3f}x", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--geometries", action="store_true", help="measure every geometry that fits a row")
    parser.add_argument("--only", nargs="+", metavar="NxC", help="sizes, such as 16384x1000 (default: all)")
    arguments = parser.parse_args()
    if unknown := set(arguments.only or ()) - {f"{N}x{C}" for N, C, _ in SIZES}:
        parser.error(f"unknown size {', '.join(sorted(unknown))}")
    copy = 1e9 * timer.copy_bandwidth(torch.device("cuda"))
    rows = [
        measure(N, C, dtype, copy, arguments.geometries)
        for N, C, dtype in SIZES
        if arguments.only is None or f"{N}x{C}" in arguments.only
    ]
    if arguments.out is not None:
        found = {"environment": describe(torch.device("cuda")), "copy_gb_per_s": copy / 1e9, "rows": rows}
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
