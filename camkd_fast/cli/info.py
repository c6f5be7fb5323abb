"""`camkd-fast info`: versions, machine and backends. Needs only torch."""

from __future__ import annotations

import importlib.metadata
import platform
import warnings

import torch

from .. import __version__
from ..backends.dispatch import BACKENDS, availability, explain
from ..system import processor_name


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _instruction_set() -> str:
    if not availability("cpu").usable:
        return "none (no compiled CPU module)"
    from ..backends import cpu

    return cpu.instruction_set()


def environment() -> dict[str, str]:
    """Versions and machine, for measurements and bug reports."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "camkd_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "OS": platform.platform(),
        "processor": processor_name(),
        "instruction set": _instruction_set(),
        "threads": str(torch.get_num_threads()),
        "GPU": ", ".join(gpus) or "none",
    }


def info() -> int:
    """Print versions, backends and the reason for each missing one; return the exit status."""
    for name, value in environment().items():
        print(f"{name:<16} {value}")
    print("\nbackends")
    for name in BACKENDS:
        state = availability(name)
        print(f"  {name:<14} {'usable ' if state.usable else 'missing'}  {state.reason}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the lines above already have the reasons
        print(f"  {'auto':<14} {explain(torch.zeros(1, 1))}")
    return 0
