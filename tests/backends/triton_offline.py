"""Compile the kernels that the Triton launchers would launch, for GPUs that this machine does not have.

The launchers run on CPU tensors with `JITFunction.run` replaced: arguments are specialised by Triton as on a GPU, and
the kernel is compiled instead of launched. So the shipped launches are the ones inspected. Runs as a program, see
`main`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from camkd_fast.system import processors

CUOBJDUMP = "backends/nvidia/bin/cuobjdump"


class Shape(NamedTuple):
    """One call of one launcher. `layout`: contiguous | sliced (from a wider tensor) | shifted (odd address) | 3d."""

    op: str
    C: int
    K: int = 3
    dtype: str = "bfloat16"
    weighting: str = "confidence"
    temperature: float = 4.0
    N: int = 4
    teacher_dtype: str = ""
    layout: str = "contiguous"
    needs_grad: bool = True
    scale_on_device: bool = False
    mean: bool = False
    two_labels: bool = False
    divergence: str = "forward_kl"  # "jsd" and "skew" with 0.3
    everything: bool = False  # z-loss, logit maps, entropies, no T^2
    in_place: bool = False


class Kernel(NamedTuple):
    """A compiled kernel."""

    name: str
    registers: int
    stack: int  # bytes of local memory per thread: spills
    threads: int
    loads: dict[str, int]  # PTX global loads by width in bits
    stores: dict[str, int]
    asserts: bool  # device-side assertions
    key: str  # Triton's cache key: two launches of one key share a compilation


def _logits(shape: Shape, dtype: str) -> Any:
    import torch

    kind = getattr(torch, dtype)
    if shape.layout == "3d":
        return torch.zeros(2, shape.N, shape.C, dtype=kind)[:, :-1]
    if shape.layout == "sliced":
        return torch.zeros(shape.N, shape.C + 64, dtype=kind)[:, : shape.C]
    if shape.layout == "shifted":
        return torch.zeros(shape.N, shape.C + 64, dtype=kind)[:, 1 : 1 + shape.C]
    return torch.zeros(shape.N, shape.C, dtype=kind)


def _call(shape: Shape) -> None:
    import torch

    import camkd_fast.kernels as kernels
    from camkd_fast.backends.contract import ROW_SUMS, SecondLabels
    from camkd_fast.kernels import batch_mean
    from camkd_fast.losses.formula import Formula

    student = _logits(shape, shape.dtype)
    teachers = [_logits(shape, shape.teacher_dtype or shape.dtype) for _ in range(shape.K)]
    N = student.numel() // shape.C
    target = torch.zeros(N, dtype=torch.int64)
    second = SecondLabels(torch.zeros(N, dtype=torch.int64), torch.ones(N)) if shape.two_labels else None
    sums = torch.ones(shape.K + 1, ROW_SUMS, N)
    per_row = torch.zeros(shape.K, N)
    given = torch.ones(shape.K, 1).expand(shape.K, N)
    softcaps = (5.0,) * shape.K
    beyond = {"z_loss_weight": 0.1, "entropy": True, "scale_by_t2": False, "student_softcap": 5.0}
    formula = Formula(
        shape.temperature,
        weighting=given if shape.weighting == "given" else shape.weighting,
        divergence=(shape.divergence, 0.3) if shape.divergence in ("jsd", "skew") else shape.divergence,
        **({**beyond, "teacher_softcaps": softcaps} if shape.everything else {}),
    )
    calls: dict[str, Callable[[], object]] = {
        "row_loss": lambda: kernels.row_loss(
            student, teachers, target, formula.checked(shape.K),
            needs_grad=shape.needs_grad, grad_scale=torch.ones(1) if shape.scale_on_device else 1.0, mean=shape.mean,
            second=second, out=student if shape.in_place else None,
        ),
        "row_sums": lambda: kernels.row_sums(student, teachers, target, formula.checked(shape.K)),
        "mixture_sums": lambda: kernels.row_sums(student, teachers, target, formula.checked(shape.K), sums),
        "row_results": lambda: kernels.row_results(
            student, teachers, target, formula.checked(shape.K), sums,
            needs_grad=shape.needs_grad, grad_scale=torch.ones(1) if shape.scale_on_device else 1.0, out=student,
        ),
        "confidence_forward": lambda: kernels.confidence_forward(teachers, target, -100, second=second),
        "confidence_backward": lambda: kernels.confidence_backward(teachers, target, per_row, per_row, second),
        "feature_forward": lambda: kernels.feature_forward([student] * shape.K, teachers),
        "feature_backward": lambda: kernels.feature_backward([student] * shape.K, teachers, per_row),
        "feature_loss": lambda: kernels.feature_loss(
            [student] * shape.K, teachers, per_row, needs_grad=True,
            scale=torch.ones(1) if shape.scale_on_device else 1.0,
        ),
        "scale_rows": lambda: kernels.scale_rows(student, per_row[0], student),
        "batch_count": lambda: batch_mean.count_rows(target, -100, torch.ones(1)),
        "batch_mean": lambda: batch_mean.add_up_rows(torch.ones(3, N), torch.ones(()), torch.ones(3)),
        "min_norm": lambda: kernels.min_norm(torch.eye(shape.K), 0.6, 20, 1e-12),
        "scale_all": lambda: kernels.scale_rows(student, per_row[0, :1], student),
    }  # fmt: skip
    calls[shape.op]()


def _widths(ptx: str, instruction: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for vector, bits in re.findall(rf"\b{instruction}\.global[\w:.]*?(?:\.v(\d))?\.[bfus](\d+) ", ptx):
        width = str(int(vector or 1) * int(bits))
        found[width] = found.get(width, 0) + 1
    return found


def compile_shape(shape: Shape, arch: int) -> Kernel:
    """The kernel that `shape` launches, compiled for sm_<arch>."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime import jit

    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    results: list[Kernel] = []

    def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kwargs.setdefault("debug", False)
        bind = jit.create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, options = bind(*args, **kwargs)
        key = jit.compute_cache_key({}, specialization, options)
        options, signature, constexprs, attrs = self._pack_args(backend, kwargs, bound, specialization, options)
        compiled = triton.compile(
            ASTSource(self, signature, constexprs, attrs), target=target, options=options.__dict__
        )
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            Path(cubin.name).write_bytes(compiled.asm["cubin"])
            tool = Path(triton.__file__).parent / CUOBJDUMP
            command = [str(tool), "--dump-resource-usage", cubin.name]
            usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage).groups()  # type: ignore[union-attr]
        ptx = compiled.asm["ptx"]
        results.append(
            Kernel(
                self.__name__,
                int(registers),
                int(stack) + int(local),
                32 * compiled.metadata.num_warps,
                _widths(ptx, "ld"),
                _widths(ptx, "st"),
                "__assertfail" in ptx,
                str(key),
            )
        )

    jit.JITFunction.run = compile_instead
    _call(shape)
    # Before the rows of a large batch come their labels; a feature_sum_kernel may follow.
    return next(kernel for kernel in results if shape.op != "row_loss" or kernel.name.startswith("row_loss"))


def _job(job: tuple[list[Any], int]) -> list[Any]:
    return list(compile_shape(Shape(*job[0]), job[1]))


def main() -> None:
    """Read [[shape, arch], ...] as JSON from stdin and write the kernels as JSON to stdout."""
    jobs = json.load(sys.stdin)
    with ProcessPoolExecutor(processors()) as pool:
        json.dump(list(pool.map(_job, jobs, chunksize=4)), sys.stdout)


def compile_all(shapes: list[Shape], archs: list[int], debug: bool = False) -> list[tuple[Shape, int, Kernel]]:
    """Compile every shape for every architecture, in a process without TRITON_INTERPRET, which is read once."""
    jobs = [(list(shape), arch) for shape in shapes for arch in archs]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CAMKD_FAST_DEBUG"] = str(int(debug))
    result = subprocess.run(
        [sys.executable, __file__], input=json.dumps(jobs), env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    kernels = (Kernel(*fields) for fields in json.loads(result.stdout))
    return [(Shape(*fields), arch, kernel) for (fields, arch), kernel in zip(jobs, kernels, strict=True)]


if __name__ == "__main__":
    main()
