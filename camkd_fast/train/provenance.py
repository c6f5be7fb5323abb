"""Which code a result comes from."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

# Results, and the texts and pages that are made of them, make no difference to the next ones.
_WRITTEN = ("benchmarks/results", "benchmarks/study/results.jsonl", "benchmarks/study/report.html", "README.md", "docs")


def commit() -> str:
    """The checkout's commit, with + where it has uncommitted changes outside what results are written to.

    A copy without its history, or beside another one, names its commit in CAMKD_FAST_COMMIT; "unknown" without either.
    """
    if named := os.environ.get("CAMKD_FAST_COMMIT"):
        return named

    def git(*arguments: str) -> str:
        folder = Path(__file__).parent
        try:
            done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
        except OSError:
            return ""
        return done.stdout.strip()

    name = git("rev-parse", "--short=10", "HEAD")
    if not name:
        return "unknown"
    changed = git("status", "--porcelain", "--", ":/", *(f":!/{path}" for path in _WRITTEN))
    return name + ("+" if changed else "")
