"""Whole runs of the trainers: killed and resumed ones, and against the formulas from all logits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs() -> Any:
    from tests.support import distilled_runs

    return distilled_runs


@pytest.mark.parametrize("name", ["mixin", "sft", "distillation"])
def test_a_killed_run_is_resumed(name: str, runs: Any, tmp_path: Path) -> None:
    whole = runs.trainer(name, tmp_path / "whole", save_strategy="no")
    whole.train()
    expected = runs.losses(whole)
    assert len(expected) == runs.STEPS and len(set(expected)) == runs.STEPS
    killed = subprocess.run(
        [sys.executable, "-m", "tests.support.distilled_runs", name, str(tmp_path / "killed")],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "killed" / f"checkpoint-{runs.SAVED}").exists()
    resumed = runs.trainer(name, tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)
    found = runs.losses(resumed)
    assert len(found) == runs.STEPS
    for ours, theirs in zip(found, expected, strict=True):
        assert abs(ours - theirs) <= 1e-6 * abs(theirs)


def test_a_run_follows_the_formulas(runs: Any, tmp_path: Path) -> None:
    found = []
    for name in ("mixin", "sft", "unfused"):
        trainer = runs.trainer(name, tmp_path / name, save_strategy="no")
        trainer.train()
        found.append(runs.losses(trainer))
    mixin, sft, expected = found
    assert expected[-1] < expected[0]
    for losses in (mixin, sft):
        for ours, theirs in zip(losses, expected, strict=True):
            assert abs(ours - theirs) <= 1e-4 * abs(theirs)
