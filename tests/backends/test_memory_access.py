"""No backend reads or writes beyond its tensors: they end, or begin, at a page without access, in a process apart."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.backends import WITHOUT_MODULE

ROOT = Path(__file__).parents[2]
BACKENDS = [
    pytest.param(
        "camkd_fast.kernels",
        marks=pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    ),
    pytest.param("camkd_fast.backends.cpu", marks=pytest.mark.skipif(WITHOUT_MODULE, reason="no compiled module")),
]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="uses mprotect")


def run(what: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.guarded_memory", what]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "2"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_beyond_the_tensors_is_touched(backend: str) -> None:
    done = run(backend)
    assert done.returncode == 0, done.stderr[-2000:]


def test_one_byte_beyond_is_noticed() -> None:
    assert run("reads_beyond").returncode == -signal.SIGSEGV
