"""The command line: `camkd-fast info` and `camkd-fast demo`. Only torch is imported until a command needs more."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from . import __version__
from .dispatch import BACKENDS, availability, explain

_TRAIN_EXTRA = {"numpy": "numpy", "sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """The processor's name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _instruction_set() -> str:
    if not availability("cpu").usable:
        return "none (no compiled CPU module)"
    from . import native

    return native.instruction_set()


def environment() -> dict[str, str]:
    """What a measurement or a bug report must say about this process."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "camkd_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "OS": platform.platform(),
        "processor": _processor(),
        "instruction set": _instruction_set(),
        "threads": str(torch.get_num_threads()),
        "GPU": ", ".join(gpus) or "none",
    }


def info() -> int:
    for name, value in environment().items():
        print(f"{name:<16} {value}")
    print("\nbackends")
    for name in BACKENDS:
        state = availability(name)
        print(f"  {name:<14} {'usable ' if state.usable else 'missing'}  {state.reason}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the lines above say it already
        print(f"  {'auto':<14} {explain(torch.zeros(1, 1))}")
    return 0


def demo(out: Path) -> int:
    missing = [package for module, package in _TRAIN_EXTRA.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"camkd-fast demo needs {', '.join(missing)}: pip install 'camkd-fast[train]'", file=sys.stderr)
        return 1
    from .train import demo_report
    from .train.demo import DemoConfig, run

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"camkd-fast demo cannot write to {out}: {error.strerror}", file=sys.stderr)
        return 1
    results = run(DemoConfig())
    page = demo_report.write(results, out, environment())
    print(f"\n{demo_report.summary(results)}\n\n{page}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="camkd-fast", description="Fast multi-teacher knowledge distillation (CA-MKD) for PyTorch."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, backends and why one is missing, instruction set, threads, GPU")
    demo = commands.add_parser("demo", help="train teachers and students on digits and write a report (about a minute)")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder to write (default: %(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status; a bad command line exits with 2 and the usage."""
    options = _parser().parse_args(arguments)
    return info() if options.command == "info" else demo(options.out)
