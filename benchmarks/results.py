"""Result files, one JSON per suite and device, and the check whether they may be published."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import verdict

Row = dict[str, Any]
# fashion_mnist.json is not a suite: `python -m benchmarks.fashion_mnist` measures and publishes that example.
SUITES = ("logit_loss", "small_batch", "feature_loss", "linear_loss", "train_step", "loaders")


class RefusedError(Exception):
    """Results that must not be published, one line per file."""


def write(folder: Path, suite: str, result: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{suite}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def publishable(root: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Results of every suite under root/<device>/, as device -> suite -> result, both sorted.

    Raises:
        RefusedError: a result comes from a commit whose tests are not known to be green, or there are no results.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    refused = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        for suite in SUITES:
            path = folder / f"{suite}.json"
            if not path.exists():
                continue
            result = json.loads(path.read_text())
            where = result["environment"]
            tests = where.get("tests", verdict.UNKNOWN)
            if tests != verdict.GREEN:
                refused.append(f"{folder.name}/{path.name}: tests {tests} at commit {where['commit']}")
            found.setdefault(folder.name, {})[suite] = result
    if refused:
        rule = "to publish a result, `make test` (on a GPU: or tests/gpu) must have passed at its commit beforehand"
        raise RefusedError("\n".join([*refused, rule]))
    if not found:
        raise RefusedError(f"no results under {root}")
    return found


def geometric_mean(values: Sequence[float]) -> float:
    product = 1.0
    for value in values:
        product *= value ** (1 / len(values))
    return product
