"""A run goes on with the teachers that it has learned from, and with no others; so does a comparison."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from camkd_fast.models.model_file import MODEL
from camkd_fast.train import run, run_teachers
from camkd_fast.train.config import DataConfig, DistillConfig, LogConfig, OptimConfig, TeachConfig
from camkd_fast.train.distributed import World
from camkd_fast.train.run_folder import RunExistsError
from camkd_fast.train.run_teachers import TEACHERS
from tests.support.training import ONE

pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("one_thread")

DATA = DataConfig(images=40, views=1)
QUIET = LogConfig(tensorboard=False, progress=False)

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.num_classes = nn.Linear(64, 10), 10

    def forward(self, x):
        return 1.0 * self.fc(x.flatten(1))

def teacher():
    torch.manual_seed(0)
    return Net()
"""


def teach(out: Path, seed: int) -> None:
    optim = OptimConfig(epochs=1, batch_size=16)
    run.teach(TeachConfig("resnet8", seed, out, data=DATA, optim=optim, log=QUIET), overwrite=True)


def student(folder: Path, source: object, epochs: int = 1, **changes: Any) -> DistillConfig:
    optim = OptimConfig(epochs=epochs, batch_size=16, schedule="constant")
    given = DistillConfig("resnet8", (source,), "aver", out=folder / "s", data=DATA, optim=optim, log=QUIET)
    return replace(given, **changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders with two different teachers of one architecture."""
    folders = tmp_path_factory.mktemp("runs") / "one", tmp_path_factory.mktemp("runs") / "two"
    for seed, folder in enumerate(folders):
        teach(folder, seed)
    return folders


CHANGED = "other weights or layers"


def change(kind: str, folder: Path, runs: tuple[Path, Path]) -> None:
    """Change the teacher in `folder` as a user may, under the same name."""
    if kind == "run":
        shutil.rmtree(folder / "t")
        shutil.copytree(runs[1], folder / "t")
    elif kind == "file":
        shutil.copy(runs[1] / MODEL, folder / "t.safetensors")
    else:
        sys.modules.pop("own_teacher")
        code = (folder / "own_teacher.py").read_text()
        (folder / "own_teacher.py").write_text(code.replace("1.0 *", "50.0 *"))


def first(kind: str, folder: Path, runs: tuple[Path, Path]) -> object:
    """The source of a teacher of this kind, in `folder`."""
    sys.modules.pop("own_teacher", None)
    shutil.copytree(runs[0], folder / "t")
    shutil.copy(runs[0] / MODEL, folder / "t.safetensors")
    (folder / "own_teacher.py").write_text(CODE)
    return {"run": folder / "t", "file": folder / "t.safetensors", "code": "py:own_teacher:teacher"}[kind]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("kind", "extend"), [("run", False), ("file", True), ("code", False)])
def test_a_run_does_not_go_on_with_another_teacher(
    kind: str, extend: bool, cached: bool, tmp_path: Path, runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = first(kind, tmp_path, runs)
    cache = {"teacher_cache": tmp_path / "cache"} if cached else {}
    run.distill(student(tmp_path, source, **cache))
    before = {name: (tmp_path / "s" / name).read_bytes() for name in (MODEL, TEACHERS, "config.yaml")}
    change(kind, tmp_path, runs)
    if cached:
        cache = {"teacher_cache": tmp_path / "another"}
    with pytest.raises(RunExistsError, match=f"teacher .*{'own_teacher' if kind == 'code' else tmp_path}.* has other "):
        run.distill(student(tmp_path, source, 2, **cache), resume=True, extend=extend)
    assert before == {name: (tmp_path / "s" / name).read_bytes() for name in before}
    run.distill(student(tmp_path, source, 2, **cache), overwrite=True)
    assert (tmp_path / "s" / TEACHERS).read_bytes() != before[TEACHERS]


def test_a_run_goes_on_with_its_teacher_and_one_of_an_earlier_version_with_any(
    tmp_path: Path, runs: tuple[Path, Path]
) -> None:
    source = first("run", tmp_path, runs)
    run.distill(student(tmp_path, source))
    run.distill(student(tmp_path, source, 2), resume=True)
    ((name, digest),) = run_teachers.read(tmp_path / "s") or []
    assert name == str(source)
    (tmp_path / "s" / TEACHERS).unlink()  # as earlier versions left it
    change("run", tmp_path, runs)
    run.distill(student(tmp_path, source, 3), resume=True)
    ((_, other),) = run_teachers.read(tmp_path / "s") or []
    assert other != digest


def test_a_run_without_a_checkpoint_starts_with_the_teacher_as_it_is(tmp_path: Path, runs: tuple[Path, Path]) -> None:
    source = first("run", tmp_path, runs)
    run.distill(student(tmp_path, source))
    (tmp_path / "s" / MODEL).unlink()
    shutil.rmtree(tmp_path / "s" / "checkpoints")
    change("run", tmp_path, runs)
    run.distill(student(tmp_path, source), resume=True)
    with pytest.raises(RunExistsError, match=CHANGED):
        shutil.rmtree(tmp_path / "t")
        shutil.copytree(runs[0], tmp_path / "t")
        run.distill(student(tmp_path, source, 2), resume=True)


def test_a_damaged_file_is_named(tmp_path: Path, runs: tuple[Path, Path]) -> None:
    source = first("run", tmp_path, runs)
    run.distill(student(tmp_path, source))
    for text in ("{", "3", json.dumps([{"source": "t"}])):
        (tmp_path / "s" / TEACHERS).write_text(text)
        with pytest.raises(ValueError, match=r"teachers\.json is damaged"):
            run.distill(student(tmp_path, source, 2), resume=True)


def test_all_processes_must_have_the_same_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = ["1" * 64 + "." + "2" * 64, "3" * 64 + "." + "4" * 64]
    assert run_teachers.agreed(("a", "b"), hashes, ONE) == [("a", hashes[0]), ("b", hashes[1])]

    def gather(self: World, vector: torch.Tensor) -> torch.Tensor:
        return torch.stack([vector, vector + torch.tensor([0, 1])])

    monkeypatch.setattr(World, "gather", gather)
    with pytest.raises(ValueError, match="teacher b is not the same in all processes: process 1"):
        run_teachers.agreed(("a", "b"), hashes, ONE)
