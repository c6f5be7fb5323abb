"""Compiles csrc/cuda/ with the host compiler, for the emulated device of this folder."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import re
import subprocess
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from filelock import FileLock  # torch needs it too

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
CACHE = ROOT / "build" / "cuda_host"
CUDA = ROOT / "csrc" / "cuda"
KERNELS = sorted(CUDA.rglob("*.cu"))
OPTIMISATION = os.environ.get("CAMKD_FAST_EMULATED_OPTIMISATION", "-O1")
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
EMULATED = ['-DCAMKD_DEVICE_HEADER="host_device.h"', '-DCAMKD_LAUNCH_HEADER="host_launch.h"', f"-I{HERE}"]


def _included(path: Path, seen: set[Path]) -> set[Path]:
    """The file and the files of this repository that it includes, as far as their names are relative to it."""
    if path not in seen:
        seen.add(path)
        for name in re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE):
            if (path.parent / name).is_file():
                _included((path.parent / name).resolve(), seen)
    return seen


def _digest(flags: list[str], sources: Iterable[Path]) -> str:
    state = hashlib.sha256(repr(flags).encode())
    included: set[Path] = set()
    for source in sources:
        _included(source, included)
    # The emulated device is included by a macro.
    for path in sorted(included.union(HERE.iterdir())):
        if path.is_file() and path.suffix in (".h", ".cuh", ".cu", ".cpp", ".py"):
            state.update(path.read_bytes())
    return state.hexdigest()[:16]


def _compile(sources: list[Path], flags: list[str], link: list[str], name: str) -> Path:
    """The linked output. It and its objects are cached until a source or a flag changes."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / ".lock"):  # processes of the same tests wait for the first one
        return _compile_locked(sources, flags, link, name)


def _compile_locked(sources: list[Path], flags: list[str], link: list[str], name: str) -> Path:
    folder = CACHE / _digest([*flags, *link, name], sources)
    output = folder / name
    if output.exists():
        return output
    folder.mkdir(exist_ok=True)

    def run(*command: object) -> None:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def compile_one(source: Path) -> Path:
        target = CACHE / "objects" / f"{source.stem}-{_digest(flags, [source])}.o"
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            partial = target.with_suffix(".partial")
            run("g++", "-std=c++20", *WARNINGS, *EMULATED, *flags, "-x", "c++", "-c", source, "-o", partial)
            partial.rename(target)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    partial = folder / f"{name}.partial"
    run("g++", *flags, *objects, *link, "-pthread", "-o", partial)
    partial.rename(output)
    return output


def load_module() -> ModuleType:
    """The CUDA functions of the compiled module, emulated: `emulated_cuda`."""
    import pybind11

    flags = [
        OPTIMISATION,
        "-fPIC",
        "-fvisibility=hidden",
        f"-I{sysconfig.get_path('include')}",
        f"-I{pybind11.get_include()}",
    ]
    host = [
        CUDA.parent / name
        for name in (
            *("python/tensors.cpp", "python/readers.cpp", "python/logit_call.cpp", "python/cuda_calls.cpp"),
            *("python/confidence_call.cpp", "python/feature_call.cpp", "python/cuda_features.cpp"),
            "cpu/output_memory.cpp",
        )
    ]
    sources = [*KERNELS, CUDA / "bindings.cpp", *host, HERE / "module.cpp"]
    path = _compile(sources, flags, ["-shared"], f"emulated_cuda{importlib.machinery.EXTENSION_SUFFIXES[0]}")
    spec = importlib.util.spec_from_file_location("emulated_cuda", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _race_program(*dropped: str) -> Path:
    flags = [OPTIMISATION, "-g", "-fsanitize=thread", *(f"-DCAMKD_DROP_{name}" for name in dropped)]
    kernels = [path for path in KERNELS if path.stem not in ("bf16", "f16")]  # race_check.cpp is float32
    return _compile([*kernels, HERE / "race_check.cpp"], flags, [], "race_check")


def race_check(*dropped: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs every kernel under ThreadSanitizer, without the kinds of barriers and waits in `dropped` (BLOCK_BARRIER,
    COPIES_WAIT and so on), or without a single one, CAMKD_DROP_SITE (host_threads.h)."""
    program = _race_program(*dropped)
    # This sanitizer cannot handle the address space randomisation of some Linux kernels.
    command = ["setarch", "-R", str(program)]
    variables = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=900)


def barrier_sites() -> list[tuple[str, str, str]]:
    """(kind, address, source lines from callee to caller) of each barrier or wait that race_check runs."""
    done = race_check(CAMKD_LIST_SITES="1")
    assert done.returncode == 0, done.stderr
    sites = []
    for kind, address in map(str.split, done.stdout.splitlines()):
        command = ["addr2line", "-i", "-e", str(_race_program()), address]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        sites.append((kind, address, lines))
    return sites
