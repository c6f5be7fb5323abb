"""`python -m benchmarks.row_kernel`: how near the CUDA kernel of the logit loss comes to the copy bandwidth of a GPU.

Calls follow each other without a wait, so that the kernel's time counts and the host's does not. The share of copy is
the time in which a copy moves as many bytes as the loss must read and write, over the time of a call. K = 3, T = 4.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import timer
from benchmarks.environment import describe
from benchmarks.shapes import BF16, F32, Shape
from camkd_fast import camkd_loss_and_grad

SIZES = (
    (8192, 128256, BF16), (4096, 32000, BF16), (16384, 1000, BF16), (4096, 151936, BF16), (2048, 262144, BF16),
    (16384, 4096, BF16), (8192, 10000, BF16), (16384, 1000, F32), (4096, 32000, F32), (4096, 128256, F32),
)  # fmt: skip
ROUNDS = 7


def seconds(call: Callable[[], object], count: int) -> float:
    """Seconds of a call: the median over rounds of `count` calls."""
    found = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(300_000)  # the first calls are enqueued meanwhile
        start.record()
        for _ in range(count):
            call()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / count / 1e3)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="a JSON file")
    arguments = parser.parse_args()
    device = torch.device("cuda")
    copy, rows = 1e9 * timer.copy_bandwidth(device), []
    for N, C, dtype in SIZES:
        shape = Shape(N, C, 3, dtype)
        batch = shape.batch(device)
        bytes_moved = 5 * N * C * dtype.itemsize

        def call(batch: object = batch) -> None:
            camkd_loss_and_grad(*batch, backend="cuda")  # type: ignore[misc]

        for _ in range(5):
            call()
        took = seconds(call, max(5, min(60, int(8e-3 * copy / bytes_moved))))
        rows.append({"N": N, "C": C, "dtype": str(dtype), "us": 1e6 * took, "share_of_copy": bytes_moved / took / copy})
        print(f"{shape}: {1e6 * took:.0f} us, {rows[-1]['share_of_copy']:.1%} of copy", flush=True)
    if arguments.out is not None:
        found = {"environment": describe(device), "copy_gb_per_s": copy / 1e9, "rows": rows}
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
