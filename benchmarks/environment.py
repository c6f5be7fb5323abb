"""What a measurement was taken on: recorded in every result."""

from __future__ import annotations

import datetime
import re
import subprocess
from pathlib import Path

from camkd_fast.cli import environment

RESULTS = Path(__file__).parent / "results"


def commit() -> str:
    """The checkout's commit, with + where it has uncommitted changes outside the results."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=False
        ).stdout.strip()

    dirty = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/benchmarks/results")
    return (git("rev-parse", "--short=10", "HEAD") or "unknown") + ("+" if dirty else "")


def describe() -> dict[str, str]:
    """Device, versions, commit and date of this process."""
    return environment() | {"commit": commit(), "date": datetime.date.today().isoformat()}


def results_folder() -> Path:
    """benchmarks/results/<device>, made when missing."""
    where = environment()
    name = f"{where['processor']} {where['instruction set']} {where['threads']} threads"
    folder = RESULTS / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
