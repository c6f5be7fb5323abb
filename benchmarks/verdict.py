"""Whether the tests of a tree are green: written by pytest when it ends, read by whoever publishes a measurement.

`tests/conftest.py` calls `note` at the end of every session. One of the whole suite (`make test`, `make test-all`) that
passed makes the commit green for the CPU, and for the GPU where there is one; one of `tests/gpu` that passed makes it
green for the GPU. Any session with a failure, however small, makes it red until a whole one passes. The stamp names
the commit; a tree with uncommitted changes gets none that counts.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from camkd_fast.train.provenance import commit

ROOT = Path(__file__).parent.parent
STAMP = ROOT / ".pytest_cache" / "camkd_fast_tests.json"
GREEN, RED, UNKNOWN = "green", "red", "unknown"


def read(device: str, stamp: Path = STAMP) -> str:
    """green, red or unknown: the verdict on exactly this tree for a type of device."""
    return judge(json.loads(stamp.read_text()), commit(), device) if stamp.exists() else UNKNOWN


def judge(stamp: dict[str, object], tree: str, device: str) -> str:
    """What a stamp says about a tree; nothing about one that no commit describes."""
    if stamp["commit"] != tree or tree == "unknown" or tree.endswith("+"):
        return UNKNOWN
    return str(stamp.get(device, UNKNOWN))


def note(config: pytest.Config, status: int, stamp: Path = STAMP) -> None:
    """Keep what the session that ends with `status` has shown, if anything."""
    verdicts: dict[str, str] = {}
    if status == pytest.ExitCode.TESTS_FAILED:
        verdicts = {"cpu": RED, "cuda": RED}
    elif status == pytest.ExitCode.OK:
        verdicts = dict.fromkeys(_devices(config), GREEN)
    if not verdicts:
        return
    tree = commit()
    known = json.loads(stamp.read_text()) if stamp.exists() else {}
    stamp.parent.mkdir(exist_ok=True)
    stamp.write_text(json.dumps((known if known.get("commit") == tree else {}) | {"commit": tree} | verdicts) + "\n")


def _devices(config: pytest.Config) -> list[str]:
    """The types of device on which a session without failures has shown that everything works."""
    option = config.option
    narrowed = (option.keyword, option.deselect, option.ignore, option.ignore_glob, option.collectonly)
    if any(narrowed) or option.markexpr not in ("", "not slow"):
        return []
    if any(getattr(option, name, False) for name in ("lf", "stepwise")):
        return []
    gpu = ["cuda"] if torch.cuda.is_available() else []
    if config.args_source == pytest.Config.ArgsSource.TESTPATHS:
        return ["cpu", *gpu]
    return gpu if [Path(argument).resolve() for argument in config.args] == [ROOT / "tests" / "gpu"] else []
