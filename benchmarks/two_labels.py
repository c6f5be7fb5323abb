"""`python -m benchmarks.two_labels`: the cost of a second label, as the ratio of the times with two and with one.

Both losses of a shape are timed in alternating rounds of one process, at the two end points of contestants.py; the
median of the ratios counts. Rows have shares between 0 and 1, so that every row has two labels.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

from benchmarks import timer
from benchmarks.contestants import fill_grad
from benchmarks.shapes import BF16, F32, Batch, Shape
from camkd_fast import camkd_loss, camkd_loss_and_grad

SIZES = ((64, 100), (1024, 100), (1024, 1000), (256, 32000))


def backward(second: dict[str, torch.Tensor], batch: Batch) -> None:
    fill_grad(lambda *tensors: camkd_loss(*tensors, **second).loss, batch)


def grad(second: dict[str, torch.Tensor], batch: Batch) -> None:
    camkd_loss_and_grad(*batch, **second)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, default=8.0, help="of every shape and end point")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    for N, C in SIZES:
        shape = Shape(N, C, 3, F32 if device.type == "cpu" else BF16)
        batch = shape.batch(device)
        other, mix = (batch.target + 1 + C // 3) % C, torch.rand(N, device=device).clamp(0.01, 0.99)
        for end in (backward, grad):
            labels = {"one": {}, "two": {"second_target": other, "mix": mix}}
            subjects = {name: partial(end, second, batch.with_own_leaf()) for name, second in labels.items()}
            times = timer.interleaved(subjects, device, seconds=arguments.seconds)
            print(f"{timer.median_ratio(times['two'], times['one']):.3f}  {shape} {end.__name__}", flush=True)


if __name__ == "__main__":
    main()
