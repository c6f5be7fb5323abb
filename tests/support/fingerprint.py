"""One hash per backend over every result of some hundred evaluations, which a refactoring must not change.

    make fingerprint                                            # before: one hash per backend
    python -m tests.support.fingerprint --dump before.txt       # one hash per evaluation
    python -m tests.support.fingerprint --against before.txt    # after: names the evaluations that differ

The hashes depend on the machine and on the versions of torch, triton and the compiler: compare two runs on one machine.
`reference`, one `cpu-*` for each instruction set that this processor runs, `triton` under its interpreter, and
`cuda-host`, the CUDA kernels compiled for the host, run in a process each. A NaN counts as the same whatever its bits,
and memory that a backend leaves unwritten is NaN.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tests.support.fingerprint_cases import specs_for
from tests.support.fingerprint_evaluations import Results, evaluate

ROOT = Path(__file__).parents[2]
BACKENDS = ("triton", "cuda-host", "reference", "cpu-baseline", "cpu-avx2", "cpu-avx512")  # slowest first

# --- hashes ----------------------------------------------------------------------------------------------------------


def digest(results: Results) -> str:
    """SHA-256 of names, dtypes, shapes and bytes."""
    state = hashlib.sha256()
    for name, value in sorted(results.items()):
        state.update(f"{name} {None if value is None else (value.dtype, tuple(value.shape))}\n".encode())
        if value is not None:
            value = value.detach()
            value = value.masked_fill(value.isnan(), float("nan")).contiguous()
            state.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def combined(digests: dict[str, str]) -> str:
    """The hash of a backend, whatever the order of its evaluations."""
    lines = sorted(f"{name} {value}\n" for name, value in digests.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def digests_of(name: str, pattern: str = "") -> Iterator[tuple[str, str]]:
    """(evaluation, hash) of those evaluations of a backend whose names match the regular expression."""
    with contextlib.ExitStack() as stack:
        emulated, backend = None, name.partition("-")[0]
        if name == "cuda-host":
            from tests.cuda.host import build
            from tests.cuda.host.on_host import emulated_device

            emulated, backend = build.load_module(), "cuda"
            stack.enter_context(emulated_device(emulated))
        for spec in specs_for(name):
            if re.search(pattern, spec.name):
                auto = spec.auto and backend == "cpu"
                yield spec.name, digest(evaluate(spec, "auto" if auto else backend, emulated))


# --- the command -----------------------------------------------------------------------------------------------------

WORKER = """
import json, sys, time, warnings
import torch
warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, for masked lanes of interpreted Triton
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True
torch.set_num_threads(2)
from tests.support.fingerprint import digests_of
print(json.dumps(dict(digests_of(*sys.argv[1:]))))
"""


def _run(name: str, pattern: str) -> tuple[dict[str, str], str, float]:
    """Hashes, a reason where there are none, and seconds. What libraries read once is set before the process starts."""
    environment = os.environ | {"OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    for variable in ("CAMKD_FAST_ISA", "TRITON_INTERPRET"):
        environment.pop(variable, None)
    if name == "triton":
        environment["TRITON_INTERPRET"] = "1"
    if name.startswith("cpu-"):
        environment["CAMKD_FAST_ISA"] = name.removeprefix("cpu-")
    started = time.perf_counter()
    command = [sys.executable, "-c", WORKER, name, pattern]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1]), "", seconds
    why = done.stderr.strip().rpartition("\n")[2]
    if "does not run on this processor" in why or "cannot run here" in why:
        return {}, why, seconds
    return {}, f"failed\n{done.stderr}", seconds


def _differences(now: set[str], before: set[str], pattern: str, names: list[str]) -> list[str]:
    """Backend and name of the evaluations that changed, appeared or vanished; lines are "HASH BACKEND EVALUATION"."""
    kept = set()
    for line in before:
        _, backend, evaluation = line.split(" ", 2)
        if backend in names and re.search(pattern, evaluation):
            kept.add(line)
    return sorted({line.split(" ", 1)[1] for line in now ^ kept})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fingerprint", description="one hash per backend over all its results")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="default: all")
    parser.add_argument("--cases", default="", metavar="PATTERN", help="regular expression for names of evaluations")
    parser.add_argument("--dump", type=Path, metavar="FILE", help="write one line per evaluation")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with a dump; exit with 1 on a difference")
    options = parser.parse_args(arguments)
    lines: set[str] = set()
    failed = False
    started = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        runs = pool.map(lambda name: (name, *_run(name, options.cases)), options.backend)
        for name, digests, reason, seconds in runs:
            failed |= reason.startswith("failed")
            print(f"{name:13}{reason or combined(digests)} {len(digests):4} cases {seconds:6.1f} s", flush=True)
            lines |= {f"{value} {name} {evaluation}" for evaluation, value in digests.items()}
    print(f"{len(lines)} evaluations in {time.perf_counter() - started:.0f} s")
    if options.dump:
        options.dump.write_text("".join(f"{line}\n" for line in sorted(lines, key=lambda line: line.split(" ", 1)[1])))
    if options.against:
        before = set(options.against.read_text().splitlines())
        different = _differences(lines, before, options.cases, options.backend)
        print("\n".join(different) if different else f"no difference to {options.against}")
        failed |= bool(different)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
