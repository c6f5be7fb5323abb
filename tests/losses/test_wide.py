"""10,000 random calls in processes of their own: none wrong, none crashed (`tests.support.wide`)."""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tensor_kinds import CALLS, FLOATING, REFUSED, VALUES

ROOT = Path(__file__).parents[2]


def start(folder: Path, seed: int, examples: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.wide"]
    options = ["--examples", str(examples), "--seed", str(seed), "--last", str(folder / f"{seed}.txt")]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.Popen([*command, *options], cwd=ROOT, env=environment, text=True, **output)


def counts_of(process: subprocess.Popen[str], last: Path) -> collections.Counter[str]:
    said = process.communicate()[0]
    crashed = f"the process ended with {process.returncode} in {last.read_text()}\n{said[-6000:]}"
    assert process.returncode == 0, crashed
    return collections.Counter(json.loads(said.splitlines()[-1]))


def test_a_hundred_calls(tmp_path):
    counts = counts_of(start(tmp_path, 0, 100), tmp_path / "0.txt")
    assert sum(counts.values()) == 100


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_calls(tmp_path):
    total = collections.Counter()
    for pair in ((1, 2), (3, 4)):
        processes = {seed: start(tmp_path, seed, 2700) for seed in pair}
        for seed, process in processes.items():
            total += counts_of(process, tmp_path / f"{seed}.txt")
    impossible = total.pop("no such tensor")
    print(json.dumps(dict(sorted(total.items())), indent=1))
    assert total.total() >= 10_000, impossible
    # Every sort and circumstance was among them.
    for name in (*VALUES, *FLOATING, *CALLS, "torch.func", "vmap", "make_fx"):
        assert total[f"right: {name}"] >= 20, name
    for name in REFUSED:
        assert total[f"refused: {name}"] >= 20, name
