"""`make gpu-check`: GPU tests, sanitizers and benchmarks in one command, in under nine minutes and without network.

Sections run one after another, each in its own processes and with a time limit, to which the time is added that the
sections before it left. A section that fails or exceeds its limit does not stop the next. JSON, PNGs and the log go to
$OUT (default runs/gpu-check); a table comes last. The exit status is 1 if a section failed.
`python -m benchmarks.gpu_check SECTION ...` runs only the named sections, in the given order.

Imports only the standard library, so that it can report what is missing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parent.parent
TOTAL = 535  # seconds, just below nine minutes
PASSED, FAILED, SKIPPED = "passed", "FAILED", "skipped"
SANITIZERS = ("memcheck", "racecheck", "initcheck")

PROBE = """
import json
try:
    import torch
except ImportError:
    print(json.dumps({"problem": "torch is not installed"}))
else:
    there = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if there else ""
    print(json.dumps({"problem": "" if there else f"torch {torch.__version__} sees no CUDA device", "name": name}))
"""
BACKENDS = """
from camkd_fast.backends import dispatch
for name in dispatch.BACKENDS:
    state = dispatch.availability(name)
    print(f"{name}: {'usable' if state.usable else 'missing'} ({state.reason})")
"""


class CheckError(Exception):
    """Why a section failed, in one line."""


class SkipError(Exception):
    """Why a section is skipped here."""


@dataclass
class Check:
    """Output folder, log and the time limit of the current section."""

    out: Path
    log: IO[str]
    ends: float = 0.0  # time.monotonic()
    found: list[str] = field(default_factory=list)  # findings of the current section, for the table

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.log.write(f"{text}\n")
        self.log.flush()

    def run(self, command: list[str], **environment: str) -> str:
        """Run a command, copy its output to log and terminal line by line, and return the output.

        Raises:
            CheckError: the command failed or exceeded the section's time limit.
        """
        self.say(f"$ {' '.join(command) if len(command[-1]) < 200 else command[0]}")
        left = self.ends - time.monotonic()
        if left <= 0:
            raise CheckError("no time left")
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | environment, text=True, bufsize=1, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        # An alarm instead of communicate(timeout=...), so that lines appear as they are printed.
        late = False

        def stop(*_: object) -> None:
            nonlocal late
            late = True
            os.killpg(process.pid, signal.SIGKILL)

        previous = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, left)
        lines = []
        assert process.stdout is not None
        try:
            for line in process.stdout:
                self.say(line.rstrip("\n"))
                lines.append(line)
            status = process.wait()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        text = "".join(lines)
        if late:
            raise CheckError(f"out of time after {left:.0f} s: {_last(text)}")
        if status:
            raise CheckError(f"exit status {status}: {_last(text)}")
        return text


def commit() -> str:
    """As `camkd_fast.train.provenance`, which is loaded by itself: the package needs torch."""
    spec = importlib.util.spec_from_file_location("provenance", ROOT / "camkd_fast" / "train" / "provenance.py")
    assert spec is not None and spec.loader is not None
    provenance = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(provenance)
    return str(provenance.commit())


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].strip("= ")[:160] if lines else "it printed nothing"


def device(check: Check) -> str:
    """Name of the GPU.

    Raises:
        CheckError: torch finds no GPU.
    """
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CheckError(f"no CUDA device: torch cannot be imported: {_last(done.stderr)}")
    found = json.loads(done.stdout.splitlines()[-1])
    if found["problem"]:
        raise CheckError(f"no CUDA device: {found['problem']}")
    return str(found["name"])


# --- sections --------------------------------------------------------------------------------------------------------


def build(check: Check) -> None:
    """Build with the installed compilers, torch and triton; nothing is downloaded."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-e", "."]
    check.run(pip, PIP_BREAK_SYSTEM_PACKAGES="1")
    output = check.run([sys.executable, "-c", BACKENDS])
    usable = {line.partition(":")[0]: ": usable" in line for line in output.splitlines()}
    check.found.append(", ".join(name for name, there in usable.items() if there))
    if not usable["cpu"]:
        raise CheckError(next(line for line in output.splitlines() if line.startswith("cpu:")))
    cuda = next(line for line in output.splitlines() if line.startswith("cuda:"))
    if shutil.which("nvcc") and "no CUDA C++ kernels" in cuda:
        raise CheckError(f"nvcc is installed, but {cuda}")


def tests(check: Check) -> None:
    """tests/gpu: every backend against float64, streams, graphs, memory, compile, training."""
    check.found.append(device(check))
    # Triton's compiler takes most of the time on one core; pytest-xdist, if installed, uses the other cores.
    several = ["-n", str(min(os.cpu_count() or 1, 12))] if importlib.util.find_spec("xdist") else []
    if not several:
        check.say("pytest-xdist is not installed: the tests run one after the other")
    output = check.run(
        [sys.executable, "-m", "pytest", "tests/gpu", "-m", "not slow", "-q", "-rs", "--durations=5", *several]
    )
    check.found.append(_last(output))


def sanitizer(check: Check) -> None:
    """compute-sanitizer on small shapes."""
    device(check)
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer"
    )
    if tool is None:
        raise SkipError("compute-sanitizer is not on PATH nor in /usr/local/cuda")
    problems, ends = [], check.ends
    for i, name in enumerate(SANITIZERS):
        # An equal share of the remaining time each, so that a slow tool does not starve the others.
        now = time.monotonic()
        check.ends = now + (ends - now) / (len(SANITIZERS) - i)
        command = [tool, "--tool", name, "--error-exitcode", "1", "--print-limit", "20", "--target-processes"]
        command += ["application-only", sys.executable, "-m", "tests.gpu.sanitized"]
        try:
            # Without torch's caching allocator the tool sees the bounds of every allocation.
            check.run(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
            check.found.append(name)
        except CheckError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise CheckError("; ".join(problems))


def headline(path: Path) -> str:
    """The results of the logit loss in one line."""
    rows = [row for row in json.loads(path.read_text())["rows"] if row["grid"] == "compared"]
    return ", ".join(
        f"{row['N']}x{row['C']} {row['share_of_copy']:.0%} of copy"
        + "".join(f" {row['over']['grad'][name]:.1f}x {name}" for name in ("compile",) if name in row["over"]["grad"])
        for row in rows
    )


def suites(*names: str, seconds: str) -> Callable[[Check], None]:
    """A section that runs benchmark suites on the quick grid."""

    def section(check: Check) -> None:
        device(check)
        command = [sys.executable, "-m", "benchmarks", *names, "--device", "cuda", "--shapes", "quick"]
        try:
            check.run([*command, "--seconds", seconds, "--out", str(check.out)])
        finally:
            for name in names:
                path = check.out / f"{name}.json"  # rows are written as soon as they are measured
                if path.exists():
                    check.found.append(headline(path) if name == "logit_loss" else f"{name}.json")

    return section


def plots(check: Check) -> None:
    """Draw this run's results of the logit loss, whatever its tests reported. `make bench-report` publishes results."""
    device(check)
    results = check.out / "logit_loss.json"
    if not results.exists():
        raise CheckError("no results of the loss to draw")
    check.run([sys.executable, "-m", "benchmarks.figures", str(results)])
    check.found.append(", ".join(sorted(path.name for path in check.out.glob("*.png"))))


# Seconds of each section, TOTAL together. On an H200 the build took 30 s and earlier tests, in one process, 160 s: the
# tests of today need several processes (pytest-xdist).
SECTIONS: dict[str, tuple[int, Callable[[Check], None]]] = {
    "build": (45, build),
    "tests": (140, tests),
    "sanitizer": (30, sanitizer),
    "loss": (85, suites("logit_loss", seconds="1")),
    "small batch": (20, suites("small_batch", seconds="1")),
    "features": (60, suites("feature_loss", seconds="0.5")),
    "linear": (60, suites("linear_loss", seconds="3")),
    "loaders": (15, suites("loaders", seconds="1")),
    "training": (70, suites("train_step", seconds="5")),
    "plots": (10, plots),
}


def run_sections(check: Check, names: list[str]) -> list[tuple[str, str, float, str]]:
    """(section, outcome, seconds, findings) for each."""
    table = []
    ends = time.monotonic()
    for name in names:
        budget, section = SECTIONS[name]
        started, ends = time.monotonic(), ends + budget
        check.ends, check.found = ends, []
        check.say(f"\n===== {name} (at most {max(check.ends - started, 0):.0f} s) =====")
        try:
            section(check)
            outcome = PASSED
        except CheckError as error:
            outcome = FAILED
            check.found.append(str(error))
        except SkipError as error:
            outcome = SKIPPED
            check.found.append(str(error))
        table.append((name, outcome, time.monotonic() - started, "; ".join(filter(None, check.found))))
        check.say(f"{name}: {outcome}")
    return table


def main(arguments: list[str]) -> int:
    unknown = set(arguments) - set(SECTIONS)
    if unknown:
        raise SystemExit(f"unknown section {', '.join(sorted(unknown))}; sections are {', '.join(SECTIONS)}")
    out = Path(os.environ.get("OUT") or ROOT / "runs" / "gpu-check").resolve()
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "gpu_check.log", "w") as log:
        check = Check(out, log)
        tree = commit()
        check.say(f"commit {tree}")
        table = run_sections(check, arguments or list(SECTIONS))
        check.say(f"\n{'section':<12} {'outcome':<8} {'seconds':>7}  found")
        for name, outcome, seconds, found in table:
            check.say(f"{name:<12} {outcome:<8} {seconds:7.0f}  {found}")
        failed = [name for name, outcome, *_ in table if outcome == FAILED]
        check.say(f"\n{len(table) - len(failed)} of {len(table)} sections without failure; everything is in {out}")
    keys = ("section", "outcome", "seconds", "found")
    summary = {"commit": tree, "sections": [dict(zip(keys, row, strict=True)) for row in table]}
    # Not a .json name: those in this folder are results.
    (out / "gpu_check_summary.txt").write_text(json.dumps(summary, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
