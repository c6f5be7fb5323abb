"""`make bench`: the logit loss, forward + backward, against the same formulas in eager PyTorch and torch.compile.

Two ways to use the fused kernel are timed: `camkd_loss(...).loss.backward()`, the swap-in for any loop, and
`camkd_loss_and_grad` with `student_logits.backward(grad)`, as training loops do, without an autograd node for the loss.
Every ratio is a median over rounds in which all subjects ran in turn.
Writes benchmarks/results/<device>/logit_loss.json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import environment, timer
from camkd_fast import baselines, camkd_loss, camkd_loss_and_grad


class Shape(NamedTuple):
    N: int
    C: int
    K: int
    dtype: torch.dtype

    def floor_bytes(self) -> int:
        """K+1 inputs read once and one gradient written: (K+2) N C elements."""
        return (self.K + 2) * self.N * self.C * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.N} x {self.C}, K = {self.K}, {str(self.dtype).removeprefix('torch.')}"


SHAPES = [
    Shape(64, 100, 3, torch.float32),
    Shape(1024, 100, 3, torch.float32),
    Shape(1024, 1000, 3, torch.float32),
    Shape(4096, 1000, 5, torch.float32),
    Shape(256, 32000, 3, torch.float32),
    Shape(128, 128256, 3, torch.float32),
    Shape(1024, 1000, 3, torch.bfloat16),
    Shape(128, 128256, 3, torch.bfloat16),
]


def subjects(shape: Shape) -> dict[str, Callable[[], object]]:
    """Forward + backward of each contestant on one set of tensors."""
    generator = torch.Generator().manual_seed(0)
    logits = [3 * torch.randn(shape.N, shape.C, generator=generator) for _ in range(shape.K + 1)]
    student = logits[0].to(shape.dtype).requires_grad_()
    teachers = [z.to(shape.dtype) for z in logits[1:]]
    target = torch.randint(shape.C, (shape.N,), generator=generator)

    def backward_of(loss: Callable[..., Tensor]) -> Callable[[], None]:
        def run() -> None:
            student.grad = None
            loss(student, teachers, target).backward()

        return run

    def value_and_grad() -> None:
        # As a loop uses it, and to where the others end: with the gradient accumulated in student.grad.
        student.grad = None
        _, grad = camkd_loss_and_grad(student, teachers, target)
        student.backward(grad)

    torch._dynamo.reset()
    return {
        "eager": backward_of(baselines.eager_loss),
        # Specialised to the shape: the best that torch.compile does with it.
        "compile": backward_of(torch.compile(baselines.eager_loss, dynamic=False)),
        "autograd": backward_of(lambda s, zs, y: camkd_loss(s, zs, y).loss),
        "value_and_grad": value_and_grad,
    }


def check_agreement(shape: Shape) -> None:
    """Refuses to time contestants that do not compute the same loss."""
    torch.manual_seed(0)
    student, *teachers = (torch.randn(8, shape.C) for _ in range(shape.K + 1))
    target = torch.randint(shape.C, (8,))
    ours, theirs = camkd_loss(student, teachers, target).loss, baselines.eager_loss(student, teachers, target)
    if not torch.allclose(ours, theirs, rtol=1e-4):
        raise SystemExit(f"{shape}: camkd_loss gives {ours.item()}, the baseline gives {theirs.item()}")


def measure(shape: Shape, seconds: float) -> dict[str, object]:
    """One row of the table."""
    check_agreement(shape)
    times = timer.interleaved(subjects(shape), seconds=seconds)
    row: dict[str, object] = {"N": shape.N, "C": shape.C, "K": shape.K, "dtype": str(shape.dtype)}
    row["floor_bytes"] = shape.floor_bytes()
    for name, values in times.items():
        row[name] = timer.percentiles(values)
    for ours in ("autograd", "value_and_grad"):
        for theirs in ("eager", "compile"):
            row[f"{ours}_over_{theirs}"] = timer.median_ratio(times[theirs], times[ours])
    row["rounds"] = len(times["eager"])
    row["model_gb_per_s"] = shape.floor_bytes() / statistics.median(times["value_and_grad"]) / 1e9
    return row


HEADER = (
    f"{'N x C':>14} {'K':>2} {'dtype':>8} | {'eager':>8} {'compile':>8} {'autograd':>8} {'val+grad':>8} ms |"
    f" {'autograd over':^16} | {'val+grad over':^16} | {'model':>6} {'of':>5}\n"
    f"{'':>14} {'':>2} {'':>8} | {'':>8} {'':>8} {'':>8} {'':>8}    |"
    f" {'eager':>7} {'compile':>8} | {'eager':>7} {'compile':>8} | {'GB/s':>6} {'copy':>5}"
)


def line(row: dict[str, object], bandwidth: float) -> str:
    def ms(name: str) -> str:
        entry = row[name]
        assert isinstance(entry, dict)
        return f"{entry['p50_ms']:8.3f}"

    size = f"{row['N']} x {row['C']}"
    rate = float(str(row["model_gb_per_s"]))
    ratios = [row[f"{a}_over_{b}"] for a in ("autograd", "value_and_grad") for b in ("eager", "compile")]
    return (
        f"{size:>14} {row['K']:>2} {str(row['dtype']).removeprefix('torch.'):>8} | "
        f"{ms('eager')} {ms('compile')} {ms('autograd')} {ms('value_and_grad')}    | "
        f"{ratios[0]:6.1f}x {ratios[1]:7.1f}x | {ratios[2]:6.1f}x {ratios[3]:7.1f}x | "
        f"{rate:6.1f} {rate / bandwidth:4.0%}"
    )


def summary(rows: list[dict[str, object]]) -> dict[str, float]:
    """Geometric means and minima of the ratios."""
    out: dict[str, float] = {}
    for ours in ("autograd", "value_and_grad"):
        for theirs in ("eager", "compile"):
            ratios = [float(str(row[f"{ours}_over_{theirs}"])) for row in rows]
            out[f"{ours}_over_{theirs}_geomean"] = math.prod(ratios) ** (1 / len(ratios))
            out[f"{ours}_over_{theirs}_min"] = min(ratios)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=8.0, help="time per shape (default: 8)")
    arguments = parser.parse_args()
    where = environment.describe()
    bandwidth = timer.copy_bandwidth()
    print(
        f"{where['processor']}, {where['instruction set']}, {where['threads']} threads, torch {where['torch']}, ",
        end="",
    )
    print(f"commit {where['commit']}, copy {bandwidth:.1f} GB/s\n{HEADER}")
    rows = []
    for shape in SHAPES:
        rows.append(measure(shape, arguments.seconds))
        print(line(rows[-1], bandwidth), flush=True)
    totals = summary(rows)
    for ours in ("autograd", "value_and_grad"):
        means = (totals[f"{ours}_over_{theirs}_geomean"] for theirs in ("eager", "compile"))
        lowest = totals[f"{ours}_over_compile_min"]
        print("{}: geometric mean {:.1f}x eager, {:.1f}x torch.compile".format(ours, *means), end="")
        print(f", least {lowest:.1f}x torch.compile")
    path = environment.results_folder() / "logit_loss.json"
    result = {"environment": where, "copy_gb_per_s": bandwidth, "rows": rows, "summary": totals}
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path.relative_to(environment.RESULTS.parent.parent)}")


if __name__ == "__main__":
    main()
