"""Machine code of the CUDA kernels: no spills, no local memory, 16-byte accesses. No GPU is needed.

The fast tests read the machine code in the installed module, for whatever GPUs it was built. The slow ones compile the
sources for each architecture, with warnings as errors.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from tests.support.backends import BACKENDS
from tests.support.gpu import ARCHITECTURES

ROOT = Path(__file__).parents[2]
ARCHS = [f"sm_{number}" for number in ARCHITECTURES]
SOURCES = sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))
# Instances of each kernel: one per element type; row_loss_kernel also for a warp and a block per row, and 1 to 5
# teachers or any number, warp_rows_kernel and pipelined_kernel for 1 to 5 teachers. One feature_kernel serves all pairs
# of element types.
KERNELS = {
    "row_loss_kernel": 36,
    "warp_rows_kernel": 15,
    "pipelined_kernel": 15,
    "any_formula_kernel": 3,
    "batch_count_kernel": 1,
    "batch_sum_kernel": 1,
    "confidence_fwd_kernel": 3,
    "confidence_bwd_kernel": 3,
    "feature_kernel": 1,
    "feature_sum_kernel": 1,
    "scale_rows_kernel": 3,
}
THREADS = 256  # of a block, as in launch_table.h
# Bytes of stack that a kernel may use. For sm_120 the compiler keeps one or two registers of these in local memory; in
# the 16-bit ones they are logits that a warp looks up ahead, which no loop over columns reads.
STACK = {("sm_120", f"row_loss_kernelINS0_{T}ELb1ELi{K}E"): 8 for T in ("4bf16", "3f16") for K in (1, 2)}
STACK["sm_120", "row_loss_kernelIfLb0ELi1E"] = 8

if shutil.which("nvcc") is None:
    pytest.skip("no nvcc", allow_module_level=True)
NVCC = re.search(r"release (\d+)\.(\d+)", subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout)
if NVCC is not None and tuple(map(int, NVCC.groups())) < (12, 8):  # as in csrc/cuda/cuda.cmake
    pytest.skip(f"nvcc {NVCC[1]}.{NVCC[2]}, but the kernels need 12.8", allow_module_level=True)


def cuobjdump() -> str:
    """The one of the CUDA toolkit or the one in the triton package."""
    found = shutil.which("cuobjdump")
    if found is None:
        triton = pytest.importorskip("triton", reason="neither the toolkit nor triton has a cuobjdump here")
        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return found


def run(*command: object) -> str:
    # cuobjdump runs nvdisasm, which is in the same folder.
    path = f"{Path(cuobjdump()).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=os.environ | {"PATH": path}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@cache
def module() -> Path:
    """The compiled module, which must have CUDA kernels unless it was built with CAMKD_FAST_CUDA=0."""
    if "cpu" not in BACKENDS:
        pytest.skip("a build without the compiled module")
    from camkd_fast import _C

    built, text = _C.cuda_build()
    if text == "CAMKD_FAST_CUDA=0 at build time":
        pytest.skip("built without CUDA kernels on purpose")
    assert built, f"nvcc is there, but the module has no CUDA kernels: {text}"
    return Path(_C.__file__)


def is_row_kernel(name: str) -> bool:
    return "row_loss" in name or "warp_rows" in name or "pipelined" in name


def shares_rows(name: str) -> bool:
    """Whether cooperative groups of its blocks may share rows."""
    return "pipelined" in name or ("row_loss" in name and "Lb0" in name)


def adds_up_rows(name: str) -> bool:
    """Whether the kernel computes a minibatch of the logit loss, whose blocks meet at counters."""
    return is_row_kernel(name) or "any_formula" in name


def check_resources(report: str, arch: str) -> None:
    """Check a report of `cuobjdump -res-usage`: per function its registers and bytes of stack and local memory."""
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    for kernel, count in KERNELS.items():
        assert sum(kernel in name for name, *_ in usage) == count, f"{arch}: {kernel} is missing"
    for name, registers, stack, local in usage:
        allowed = sum(count for (of, kernel), count in STACK.items() if of == arch and kernel in name)
        used = f"{arch} {name}: {stack} bytes of stack, {local} of local memory"
        assert int(stack) <= allowed and local == "0", used
        if adds_up_rows(name):
            # Threads of a multiprocessor, as in blocks_per_multiprocessor() and pipeline_threads() of launch_table.h.
            few = re.search(r"Li[123]E", name) is not None
            threads = (640 if few else 512) if "pipelined" in name else THREADS * (3 if few else 2)
            assert int(registers) * threads <= 65536, f"{arch} {name}: {registers} registers"


def built() -> list[str]:
    """Architectures whose machine code is in the module."""
    from camkd_fast import _C

    module()
    archs = [arch.partition("-") for arch in _C.cuda_build()[1].split()]
    return [f"sm_{number}" for number, _, kind in archs if kind != "virtual"]


def test_no_spills_in_the_module() -> None:
    for arch in built():
        check_resources(run(cuobjdump(), "-res-usage", "-arch", arch, module()), arch)


def accesses(arch: str) -> dict[str, Counter[str]]:
    """Number of memory instructions of each kernel by mnemonic."""
    found: dict[str, Counter[str]] = {}
    for line in run(cuobjdump(), "-sass", "-arch", arch, module()).splitlines():
        if match := re.search(r"Function : (\S+)", line):
            counts = found.setdefault(match[1], Counter())
        elif match := re.search(r"\s(LDGSTS|LDG|LDS|STG|LDL|STL|ATOM\w*|RED[GS]?\b)([.\w]*)", line):
            counts[match[1] + (".128" if ".128" in match[2] else "")] += 1
    return found


def check_accesses(name: str, counts: Counter[str]) -> None:
    assert not {"LDL", "STL"} & set(counts), name
    # A counter finds the last block, and another one adds up the labels of all blocks, which are whole numbers. Where
    # cooperative groups share rows, their exchanges are counted likewise.
    atomics, reductions = (sum(n for key, n in counts.items() if key.startswith(kind)) for kind in ("ATOM", "RED"))
    counters = (1 + shares_rows(name)) if adds_up_rows(name) else 0
    assert (atomics, reductions) == (counters or int("feature_kernel" in name), counters), name
    if "batch_" in name or "sum_kernel" in name:
        return  # a few numbers per row
    assert counts["LDGSTS.128"] if is_row_kernel(name) else counts["LDG.128"], f"narrow loads: {name}"
    if "fwd" not in name:
        assert counts["STG.128"], f"narrow stores: {name}"


@pytest.mark.slow
def test_wide_accesses_and_no_atomic_sums() -> None:
    """Logits are read 16 bytes at a time, in row_loss without passing registers, and gradients are written so."""
    for arch in built():
        found = accesses(arch)
        assert len(found) == sum(KERNELS.values())
        for name, counts in found.items():
            check_accesses(name, counts)


def test_module_imports_without_a_driver() -> None:
    """The CUDA runtime is linked statically: no libcuda is needed."""
    needed = run("readelf", "-d", module())  # part of binutils, like the linker
    assert not re.search(r"NEEDED.*libcuda", needed)


@pytest.mark.parametrize(
    ("gpus", "archs", "expected"),
    [
        ("echo 9.0; echo 9.0; echo 8.6", "", "90-real 86-real"),
        pytest.param("echo 99.0", "", "90", marks=pytest.mark.slow),  # unknown to nvcc, so PTX
        pytest.param("echo driver 9.0 does not answer; exit 9", "", "90", marks=pytest.mark.slow),
        pytest.param("echo 9.0", "100-real;120", "100-real 120", marks=pytest.mark.slow),
        ("echo 9.0", "native", None),
    ],
)
def test_a_build_is_for_the_gpus_of_this_machine(gpus: str, archs: str, expected: str | None, tmp_path: Path) -> None:
    """Configure with an nvidia-smi that lists these GPUs."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{gpus}\n")
    tool.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CAMKD_FAST_CUDA_ARCHS": archs, "CAMKD_FAST_CUDA": "1"}
    command = [
        "cmake",
        "-S",
        ROOT / "csrc",
        "-B",
        tmp_path / "build",
        "-G",
        "Ninja",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (expected is not None), done.stderr
    if expected is None:
        assert "must be like 80-real;90, got native" in " ".join(done.stderr.split())
    else:
        assert f'R"words({expected})words"' in (tmp_path / "build" / "cuda_build.h").read_text()


def test_debug_assertions_survive_the_release_build() -> None:
    assert b"camkd_fast: a label lies outside [0, C)" in module().read_bytes()


def test_the_module_is_built_of_these_sources() -> None:
    folder = ROOT / "csrc"
    listed = re.findall(r"cuda/[\w/]+\.cu\b", (folder / "cuda" / "cuda.cmake").read_text())
    assert sorted(listed) == [str(source.relative_to(folder)) for source in SOURCES]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_sources_compile_without_a_warning(arch: str, tmp_path: Path) -> None:
    report = ""
    for source in SOURCES:
        cubin = tmp_path / f"{source.stem}.cubin"
        virtual = arch.replace("sm", "compute")
        flags = ["-std=c++17", "-O3", "-Werror", "all-warnings"]
        if not any(of == arch for of, _ in STACK):
            flags += ["-Xptxas", "-warn-spills,-warn-lmem-usage"]
        run("nvcc", *flags, "-gencode", f"arch={virtual},code={arch}", "-cubin", source, "-o", cubin)
        report += run(cuobjdump(), "-res-usage", cubin)
    check_resources(report, arch)
