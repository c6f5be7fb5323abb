"""Run every Triton launcher twice, above a CUDA driver that only records: by Triton, and directly.

Triton compiles for sm_90 and launches through its own launchers, which stub_driver.c ends. Runs as a program, without
TRITON_INTERPRET; argv: the stub's path. Writes {call: [launches by Triton, direct launches, names by Triton,
names of the second run]} as JSON.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import jit

from camkd_fast.losses.formula import Formula

kernels = importlib.import_module("camkd_fast.kernels")
counters, launcher = (importlib.import_module(f"camkd_fast.kernels.{name}") for name in ("counters", "launcher"))

STREAM = 77
BYTES = {"u1": 4, "i32": 4, "fp32": 4, "i64": 8, "u64": 8, "fp64": 8}


def activate() -> None:
    """CPU tensors are on device 0, whose current stream is STREAM."""
    torch.cuda.current_device = lambda: 0
    torch.cuda.is_current_stream_capturing = lambda: False
    driver = CudaDriver()
    driver.get_current_device, driver.get_current_stream = (lambda: 0), (lambda device: STREAM)
    driver.get_device_capability = lambda device=0: (9, 0)
    triton.runtime.driver.set_active(driver)
    for module in (launcher, counters):
        module.device_of, module.current_device = (lambda x: 0), (lambda: 0)
        module.current_stream = lambda device: STREAM


class Recorder:
    """What reaches the driver."""

    def __init__(self, path: str) -> None:
        self.stub = ctypes.CDLL(path)
        self.stub.stub_parameter.restype = self.stub.stub_config.restype = ctypes.c_uint64
        self.by_triton: list[str] = []
        self.launches: list[list[int]] = []
        self.count = 0
        run, launch, of_kernel = jit.JITFunction.run, launcher.Launcher.__call__, launcher.CompiledKernel.run.fget

        def spy_triton(kernel: Any, *given: Any, **options: Any) -> Any:
            self.by_triton.append(kernel.__name__)
            return run(kernel, *given, **options)

        def spy_kernel(compiled: Any) -> Any:
            sizes = list(_sizes(compiled.src.signature.values()))
            self.count = len(sizes)
            self.stub.stub_expect(self.count, (ctypes.c_int * self.count)(*sizes))
            return of_kernel(compiled)

        def spy_launch(launcher: Any, *pointers: Any) -> None:
            before = self.stub.stub_launches()
            launch(launcher, *pointers)
            assert self.stub.stub_launches() == before + 1
            config = [self.stub.stub_config(i) for i in range(6)]
            self.launches.append(config + [self.stub.stub_parameter(i) for i in range(self.count)])

        jit.JITFunction.run, launcher.Launcher.__call__ = spy_triton, spy_launch
        launcher.CompiledKernel.run = property(spy_kernel)

    def record(self, call: Callable[[], object]) -> tuple[list[list[int]], list[str]]:
        self.launches, self.by_triton = [], []
        call()
        return self.launches, self.by_triton


def _sizes(signature: Any) -> Iterator[int]:
    for kind in signature:
        if isinstance(kind, tuple):
            yield from _sizes(kind)
        elif kind != "constexpr":
            yield 8 if kind[0] == "*" else BYTES[kind]


class SameMemory:
    """In the place of torch.empty and others: the second run gets the tensors of the first."""

    def __init__(self, name: str) -> None:
        self.make, self.made, self.next = getattr(torch, name), [], 0
        setattr(torch, name, self)

    def __call__(self, *given: Any, **options: Any) -> Any:
        if self.next == len(self.made):
            self.made.append(self.make(*given, **options))
        self.next += 1
        return self.made[self.next - 1]


def calls() -> dict[str, Callable[[], object]]:
    N, C = 64, 100
    student, teachers = torch.randn(N, C), [torch.randn(N, C).bfloat16() for _ in range(3)]
    target, per_row, one = torch.randint(C, (N,)), torch.rand(3, N), torch.ones(1)
    wide, tall, many, gram = (
        torch.randn(4, 20000),
        torch.randn(2500, 3),
        torch.zeros(2500, dtype=torch.int64),
        torch.eye(3),
    )
    folded = student.view(8, 8, C), [z.view(8, 8, C) for z in teachers]
    name, given = Formula(), Formula(2.5, weighting=per_row)
    maps = {"teacher_softcaps": (5.0, None, 3.0), "student_logit_scale": 0.5}
    extended = Formula(2.0, divergence=("jsd", 0.3), z_loss_weight=0.1, entropy=True, **maps).checked(3)
    rows = kernels.row_loss
    return {
        "mean": lambda: rows(student, teachers, target, name, needs_grad=True, grad_scale=1.5, mean=True),
        "sum": lambda: rows(student, teachers, target, name, needs_grad=True, total_scale=0.25),
        "given weights": lambda: rows(*folded, target, given, needs_grad=False, grad_scale=one),
        "one teacher": lambda: rows(student, teachers[:1], target, name, needs_grad=True),
        "shifted": lambda: rows(student[:, 1:], [z[:, 1:] for z in teachers], target, name, needs_grad=True),
        "wide": lambda: rows(wide, [wide], target[:4], name, needs_grad=True, mean=True),
        "counted": lambda: rows(tall, [tall], many, name, needs_grad=True, mean=True),
        "extended": lambda: rows(student, teachers, target, extended, needs_grad=True, mean=True),
        "scale": lambda: kernels.scale_rows(student, one, student),
        "confidence": lambda: kernels.confidence_forward(teachers, target, -100),
        "its gradient": lambda: kernels.confidence_backward(teachers, target, per_row, per_row),
        "features": lambda: kernels.feature_loss([student] * 3, teachers, per_row, needs_grad=True, grad_scale=2.0),
        "min_norm": lambda: kernels.min_norm(gram, 0.6, 20, 1e-12),
    }


def main(path: str) -> None:
    activate()
    recorder, memory = Recorder(path), [SameMemory(name) for name in ("empty", "empty_strided", "zeros")]
    found = {}
    for name, call in calls().items():
        for tensors in memory:
            tensors.made = []
        runs = []
        for _ in range(2):
            for tensors in memory:
                tensors.next = 0
            runs.append(recorder.record(call))
        found[name] = [runs[0][0], runs[1][0], runs[0][1], runs[1][1]]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
