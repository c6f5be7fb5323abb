"""Time of the fused loss compared with the same formulas in eager PyTorch and under torch.compile, at one shape."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from ..errors import first_line
from ..losses.eager import eager_loss
from ..losses.logit import camkd_loss
from ..system import load_average


@dataclass(frozen=True)
class LossSpeed:
    """Median times of forward + backward at one shape, float32."""

    rows: int
    classes: int
    teachers: int
    milliseconds: dict[str, float]  # "fused", "eager" and, if it works, "torch.compile"
    compile_seconds: float | None  # first forward + backward under torch.compile
    note: str  # warning for the reader (no torch.compile, busy machine), or empty

    def speedup(self, other: str) -> float:
        """Time of `other` divided by that of the fused loss."""
        return self.milliseconds[other] / self.milliseconds["fused"]


def _busy() -> str:
    """A warning if other work fills the processor, since the times are unreliable then."""
    cores = os.cpu_count() or 1
    load = load_average()
    return f"The machine was busy with other work: load {load:.1f} on {cores} cores." if load > 1.5 * cores else ""


def measure_loss_speed(rows: int, classes: int, teachers: int, rounds: int = 25, compiled: bool = True) -> LossSpeed:
    """Time all losses once per round, so that other work on the machine affects them equally."""
    generator = torch.Generator().manual_seed(0)
    student, *zs = (3 * torch.randn(teachers + 1, rows, classes, generator=generator)).unbind()
    target = torch.randint(classes, (rows,), generator=generator)
    student.requires_grad_()

    def fused(student: Tensor, zs: list[Tensor], target: Tensor) -> Tensor:
        return camkd_loss(student, zs, target).loss

    def seconds(loss: Callable[..., Tensor]) -> float:
        student.grad = None
        started = time.perf_counter()
        torch.autograd.backward(loss(student, zs, target))
        return time.perf_counter() - started

    losses: dict[str, Callable[..., Tensor]] = {"fused": fused, "eager": eager_loss}
    for loss in losses.values():
        seconds(loss)
    compile_seconds, notes = None, [_busy()]
    if compiled:
        loss = torch.compile(eager_loss)  # the first call compiles, forward and backward
        try:
            compile_seconds = seconds(loss)
            losses["torch.compile"] = loss
        except RuntimeError as error:
            # torch.compile needs a C++ compiler; without one the other two are reported.
            notes.append(f"torch.compile does not work here: {first_line(error)}")
    times: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(rounds):
        for name, loss in losses.items():
            times[name].append(seconds(loss))
    milliseconds = {name: 1e3 * median(values[rounds // 5 :]) for name, values in times.items()}
    return LossSpeed(rows, classes, teachers, milliseconds, compile_seconds, " ".join(filter(None, notes)))
