"""`make gpu-check` without a GPU: sections fail with the right message, and the remaining code runs."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, results
from benchmarks.gpu_check import FAILED, PASSED, SECTIONS, SKIPPED, Check, CheckError, SkipError
from camkd_fast.backends import dispatch
from camkd_fast.train.provenance import commit
from tests.benchmarks.test_published import loss_result
from tests.gpu import sanitized

ROOT = Path(__file__).parents[2]


def check(out: Path, seconds: float = 60.0) -> Check:
    return Check(out, io.StringIO(), time.monotonic() + seconds)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is available: run the command itself")
@pytest.mark.slow
def test_without_a_gpu_every_section_reports_it_and_the_command_fails(tmp_path: Path) -> None:
    """Every section but the build, which would reinstall the package under the running tests."""
    names = [name for name in SECTIONS if name != "build"]
    command = [sys.executable, "-m", "benchmarks.gpu_check", *names]
    environment = os.environ | {"OUT": str(tmp_path), "CAMKD_FAST_COMMIT": "abc1234"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    summary = json.loads((tmp_path / "gpu_check_summary.txt").read_text())
    rows = summary["sections"]
    assert [(row["section"], row["outcome"]) for row in rows] == [(name, FAILED) for name in names]
    assert all(row["found"].startswith("no CUDA device: torch") for row in rows)
    assert summary["commit"] == "abc1234" and done.stdout.startswith("commit abc1234\n")
    assert done.stdout.strip() == (tmp_path / "gpu_check.log").read_text().strip(), "the log differs from the output"
    assert done.stdout.strip().endswith(f"0 of {len(names)} sections without failure; everything is in {tmp_path}")


def test_an_unknown_section_is_refused() -> None:
    with pytest.raises(SystemExit, match="unknown section plot; sections are build"):
        gpu_check.main(["plot"])


def test_a_failing_section_does_not_stop_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(check: Check) -> None:
        raise CheckError("broken")

    def skips(check: Check) -> None:
        raise SkipError("no tool")

    def works(check: Check) -> None:
        check.found.append("fine")

    sections = {"a": (5, fails), "b": (5, skips), "plots": (5, works)}
    monkeypatch.setattr(gpu_check, "SECTIONS", sections)
    table = gpu_check.run_sections(check(tmp_path), list(sections))
    rows = [(name, outcome, found) for name, outcome, _, found in table]
    assert rows == [("a", FAILED, "broken"), ("b", SKIPPED, "no tool"), ("plots", PASSED, "fine")]


def test_commands_are_logged_and_their_failures_reported(tmp_path: Path) -> None:
    made = check(tmp_path)
    assert made.run([sys.executable, "-c", "print('one'); print('two')"]) == "one\ntwo\n"
    assert isinstance(made.log, io.StringIO) and "one\ntwo\n" in made.log.getvalue()
    with pytest.raises(CheckError, match="exit status 3: bad luck"):
        made.run([sys.executable, "-c", "print('bad luck'); raise SystemExit(3)"])


def test_a_command_that_runs_out_of_time_is_ended(tmp_path: Path) -> None:
    made = check(tmp_path, seconds=1.0)
    with pytest.raises(CheckError, match="out of time after 1 s: not done"):
        made.run([sys.executable, "-c", "import time; print('not done', flush=True); time.sleep(60)"])
    with pytest.raises(CheckError, match="no time left"):
        made.run([sys.executable, "-c", ""])


def test_the_build_section_reports_the_usable_backends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the pip command, which would rebuild the package under the running tests."""
    run = Check.run
    monkeypatch.setattr(
        Check, "run", lambda self, command, **env: "" if "pip" in command else run(self, command, **env)
    )
    monkeypatch.setattr(gpu_check.shutil, "which", lambda *_, **__: None)
    made = check(tmp_path)
    if dispatch.availability("cpu").usable:
        gpu_check.build(made)
        assert "cpu" in made.found[0]
    monkeypatch.setattr(gpu_check.shutil, "which", lambda *_, **__: "/usr/bin/nvcc")
    if dispatch.availability("cpu").usable and "no CUDA C++ kernels" not in dispatch.availability("cuda").reason:
        gpu_check.build(made)
    monkeypatch.setattr(
        gpu_check, "BACKENDS", "print('cpu: usable\\ncuda: missing (this build has no CUDA C++ kernels)')"
    )
    with pytest.raises(CheckError, match="nvcc is installed, but cuda: missing"):
        gpu_check.build(made)


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, commands: list[list[str]]) -> None:
    """Pretend that a GPU is available, and record commands instead of running them."""

    def noted(self: Check, command: list[str], **environment: str) -> str:
        commands.append(command)
        return "=== 7 passed in 1.0s ===\n"

    monkeypatch.setattr(gpu_check, "device", lambda check: "Some GPU")
    monkeypatch.setattr(Check, "run", noted)


def test_sections_with_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    on_a_gpu(monkeypatch, commands)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name, path=None: f"/bin/{name}")
    results.write(tmp_path, "logit_loss", loss_result("cuda"))
    names = [name for name in SECTIONS if name != "build"]
    table = gpu_check.run_sections(check(tmp_path), names)
    assert {outcome for _, outcome, *_ in table} == {PASSED}
    found = {name: words for name, _, _, words in table}
    assert found["tests"] == "Some GPU; 7 passed in 1.0s"
    assert found["sanitizer"] == "memcheck; racecheck; initcheck"
    assert found["loss"].startswith("10x100 0% of copy 4.0x compile, 10x1000")
    assert ["tests/gpu" in command for command in commands].count(True) == 1
    assert [command[2] for command in commands if command[0].endswith("compute-sanitizer")] == [*gpu_check.SANITIZERS]


def test_a_missing_sanitizer_is_not_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, [])
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name, path=None: None)
    ((_, outcome, _, found),) = gpu_check.run_sections(check(tmp_path), ["sanitizer"])
    assert outcome == SKIPPED and "not on PATH" in found


def test_the_limits_of_all_sections_fit_nine_minutes() -> None:
    assert sum(limit for limit, _ in SECTIONS.values()) == gpu_check.TOTAL < 9 * 60
    assert [*SECTIONS][:2] == ["build", "tests"] and [*SECTIONS][-1] == "plots"  # of what the others measured


def test_time_that_a_section_leaves_is_for_the_next_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: dict[str, float] = {}

    def section(name: str, seconds: float) -> Callable[[Check], None]:
        def run(check: Check) -> None:
            left[name] = check.ends - time.monotonic()
            time.sleep(seconds)

        return run

    monkeypatch.setattr(
        gpu_check,
        "SECTIONS",
        {"early": (10, section("early", 0)), "late": (1, section("late", 1)), "last": (5, section("last", 0))},
    )
    gpu_check.run_sections(check(tmp_path), ["early", "late", "last"])
    assert left == pytest.approx({"early": 10, "late": 11, "last": 15}, abs=0.9)


def test_the_commit_is_that_of_the_package() -> None:
    assert gpu_check.commit() == commit()


def test_the_code_under_the_sanitizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitized, "WIDTHS", (10, 100))
    assert sanitized.run("reference", torch.device("cpu")) == 2 * (2 * 3 + 1)
