"""What a measurement was taken on: recorded in every result."""

from __future__ import annotations

import datetime
import platform
import re
import subprocess
from pathlib import Path

import torch

import camkd_fast
from camkd_fast import dispatch

RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    """The processor's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return names[0].strip() if names else platform.processor() or platform.machine()


def commit() -> str:
    """The checkout's commit, with + where it has uncommitted changes."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    dirty = git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results")
    return (git("rev-parse", "--short=10", "HEAD") or "unknown") + ("+" if dirty else "")


def describe() -> dict[str, object]:
    """Device, versions, commit and date of this process."""
    return {
        "device": processor(),
        "threads": torch.get_num_threads(),
        "cpu_backend": dispatch.availability("cpu").reason,
        "camkd_fast": camkd_fast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def results_folder() -> Path:
    """benchmarks/results/<device>, made when missing."""
    slug = re.sub(r"[^a-z0-9]+", "-", f"{processor()} {torch.get_num_threads()} threads".lower()).strip("-")
    folder = RESULTS / slug
    folder.mkdir(parents=True, exist_ok=True)
    return folder
