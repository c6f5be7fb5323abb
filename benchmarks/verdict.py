"""Whether the tests passed at a commit: written when pytest ends, read before a measurement is published.

`tests/conftest.py` calls `note` at the end of every session. A passed session of the whole suite (`make test`,
`make test-all`) makes the commit green for the CPU, and for the GPU if there is one; a passed session of `tests/gpu`
makes it green for the GPU. Any session with a failure, however small, makes it red until the whole suite passes. The
stamp names the commit; a stamp of a tree with uncommitted changes does not count.
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
    """green, red or unknown: the verdict on exactly this tree for one type of device."""
    return judge(json.loads(stamp.read_text()), commit(), device) if stamp.exists() else UNKNOWN


def judge(stamp: dict[str, object], tree: str, device: str) -> str:
    """Verdict of a stamp on a tree; unknown if the tree does not match a commit."""
    if stamp["commit"] != tree or tree == "unknown" or tree.endswith("+"):
        return UNKNOWN
    return str(stamp.get(device, UNKNOWN))


def note(config: pytest.Config, status: int, stamp: Path = STAMP) -> None:
    """Record the verdict of a session that ended with `status`, if it gives one."""
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
    """The types of device for which a session without failures counts as green."""
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
