"""What a measurement was taken on: recorded in every result."""

from __future__ import annotations

import datetime
import re
from pathlib import Path

from camkd_fast.cli import environment
from camkd_fast.train.provenance import commit

RESULTS = Path(__file__).parent / "results"


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
