"""The commit that a result was computed with."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

# Results, and pages generated from them, do not affect later results.
_WRITTEN = ("benchmarks/results", "benchmarks/study/results.jsonl", "benchmarks/study/report.html", "README.md", "docs")


def commit() -> str:
    """Abbreviated hash of the checkout, with a + for uncommitted changes outside the files that results are written to.

    CAMKD_FAST_COMMIT, if set, is returned instead (for a copy without .git). "unknown" without either.
    """
    if named := os.environ.get("CAMKD_FAST_COMMIT"):
        return named

    def git(*arguments: str) -> str:
        folder = Path(__file__).parent
        try:
            done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, check=False)
        except OSError:
            return ""
        return done.stdout.decode("utf-8", "replace").strip()

    name = git("rev-parse", "--short=10", "HEAD")
    if not name:
        return "unknown"
    changed = git("status", "--porcelain", "--", ":/", *(f":!/{path}" for path in _WRITTEN))
    return name + ("+" if changed else "")
