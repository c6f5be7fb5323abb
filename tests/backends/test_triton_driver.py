"""Direct launches reach the CUDA driver exactly as Triton's own do: the driver is a stub that records both."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.skipif(torch.version.cuda is not None, reason="the stub is no driver for torch, only for Triton"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc"),
    pytest.mark.skipif(not Path(sysconfig.get_path("include"), "Python.h").exists(), reason="needs Python.h"),
]


def test_direct_launches_pass_what_triton_passes(tmp_path: Path) -> None:
    stub = tmp_path / "libcuda.so.1"
    include = Path(triton.__file__).parent / "backends/nvidia/include"
    command = ["gcc", "-shared", "-fPIC", f"-I{include}", HERE / "stub_driver.c", "-o", stub]
    subprocess.run(command, check=True)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_LIBCUDA_PATH": str(tmp_path),
        "LD_LIBRARY_PATH": str(tmp_path),
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
    }
    command = [sys.executable, HERE / "triton_stub.py", stub]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 13
    for name, (by_triton, direct, compiled, again) in found.items():
        assert len(compiled) == len(by_triton) == (2 if name in ("counted", "features") else 1)
        assert not again, f"{name}: Triton launched {again} once more"
        assert direct == by_triton, name
        assert all(len(launch) >= 8 and launch[0] > 0 and launch[5] == 77 for launch in direct)
