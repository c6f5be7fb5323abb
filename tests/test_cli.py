"""The command line: info, bad commands, missing extras."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from camkd_fast import __version__, cli
from camkd_fast.dispatch import BACKENDS, availability


def test_info_names_versions_backends_and_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    for expected in (__version__, torch.__version__, "instruction set", "threads", "GPU"):
        assert expected in printed
    listed = printed.partition("backends\n")[2]
    for name in BACKENDS:
        state = availability(name)
        line = next(line for line in listed.splitlines() if line.split()[:1] == [name])
        assert ("usable" if state.usable else "missing") in line and state.reason in line


def test_info_imports_no_training_dependency() -> None:
    check = (
        "import sys; from camkd_fast.cli import main; main(['info']);"
        "sys.exit(bool({'sklearn', 'matplotlib', 'camkd_fast.train'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False, capture_output=True).returncode == 0


@pytest.mark.parametrize("arguments", [["no-such-command"], [], ["demo", "--no-such-option"]])
def test_bad_command_line_exits_2_with_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: camkd-fast" in capsys.readouterr().err


def test_demo_into_a_file_is_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert cli.main(["demo", "--out", str(tmp_path / "file" / "out")]) == 1
    assert "cannot write to" in capsys.readouterr().err


def test_demo_without_the_extra_names_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == "sklearn" else object())
    assert cli.main(["demo", "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "scikit-learn" in error and "camkd-fast[train]" in error and "matplotlib" not in error
    assert not (tmp_path / "out").exists()
