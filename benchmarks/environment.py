"""Device, versions and commit of a measurement, recorded in every result."""

from __future__ import annotations

import datetime
import re
import subprocess
from pathlib import Path

import torch

from benchmarks import verdict
from camkd_fast.cli import environment
from camkd_fast.train.provenance import commit

RESULTS = Path(__file__).parent / "results"


def describe(device: torch.device) -> dict[str, str]:
    """Device, versions, commit, test verdict of the commit, and date."""
    return environment() | {
        "device": device.type,
        "commit": commit(),
        "tests": verdict.read(device.type),
        "date": datetime.date.today().isoformat(),
    }


def title(where: dict[str, str]) -> str:
    """Name of the device for titles."""
    if where["device"] == "cuda":
        return where["GPU"]
    return f"{where['processor']} ({where['instruction set']}), {where['threads']} threads"


def results_folder(where: dict[str, str]) -> Path:
    """benchmarks/results/<device>."""
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", title(where).lower()).strip("-")


def clocks(device: torch.device) -> dict[str, float] | None:
    """Clock rates in MHz right now; None if the system does not report them."""
    if device.type == "cuda":
        names = ("sm", "mem", "max.sm", "max.mem")
        query = f"--query-gpu={','.join(f'clocks.{name}' for name in names)}"
        index = torch.cuda.current_device() if device.index is None else device.index
        command = ["nvidia-smi", query, "--format=csv,noheader,nounits", "-i", str(index)]
        try:
            output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
            return dict(zip(names, map(float, output.strip().split(",")), strict=True))
        except (OSError, ValueError, subprocess.SubprocessError):
            return None
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    rates = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    return {"max core": max(rates)} if rates else None
