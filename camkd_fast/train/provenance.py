"""Which code a result comes from."""

from __future__ import annotations

import subprocess
from pathlib import Path

# What results are written to: it makes no difference to the next ones.
_WRITTEN = (":!/benchmarks/results", ":!/benchmarks/study/results.jsonl", ":!/benchmarks/study/report.html")


def commit() -> str:
    """The checkout's commit, with + where it has uncommitted changes outside the results; "unknown" without one."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).parent
        try:
            done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return ""
        return done.stdout.strip()

    dirty = git("status", "--porcelain", "--untracked-files=no", "--", ":/", *_WRITTEN)
    return (git("rev-parse", "--short=10", "HEAD") or "unknown") + ("+" if dirty else "")
