"""teach, distill and the demo on emulated systems: what they lack must not be needed."""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from camkd_fast import cli
from camkd_fast.experiments import demo
from tests.support.systems import SYSTEMS, no_fork, no_unix_signals

pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("one_thread")


def quick_for(*quick: str) -> pytest.MarkDecorator:
    """All systems, those besides the quick ones only in the long suite."""
    names = [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in SYSTEMS]
    return pytest.mark.parametrize("other_system", names, indirect=True)


SMALL = "--data digits --images 60 --epochs 1 --no-progress --no-tensorboard"


def main(line: str) -> int:
    return cli.main(line.split())


@quick_for("macOS", "Windows")
def test_teach_and_distill(other_system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(f"teach {SMALL} --model resnet8 --out t") == 0
    cache = "--views 2 --teacher-cache cache"
    assert main(f"distill {SMALL} --student resnet8 --teachers t --out s {cache} --schedule constant") == 0
    assert main(f"distill {SMALL} --student resnet8 --teachers t --out s {cache}") == 1  # the folder holds a run
    line = f"distill {SMALL} --student resnet8 --teachers t --out s {cache} --schedule constant --resume --epochs 2"
    assert main(line) == 0
    assert not list(tmp_path.rglob("*.lock*")) and not list(tmp_path.rglob(".*.now.*"))


@quick_for("Windows")
def test_demo(other_system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = demo.DemoConfig()
    quick = replace(
        whole,
        teachers=tuple(replace(teacher, model="resnet8", epochs=1, images=60) for teacher in whole.teachers[:2]),
        student_epochs=1, student_images=60, seeds=(0,), compiled=False, speed_shape=(8, 10, 2),
    )  # fmt: skip
    monkeypatch.setattr(demo, "DemoConfig", lambda: quick)
    assert main(f"demo --out {tmp_path}") == 0
    assert (tmp_path / "report.html").exists()


def test_other_commands(other_system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main("info") == 0 and main("data list") == 0
    assert main("bench --shapes 8x10x2 --rounds 3 --no-compiled") == 0
    with pytest.raises(SystemExit) as stopped:
        main("teach --help")
    assert stopped.value.code == 0


SPAWN = """
import multiprocessing, sys
from camkd_fast.cli import main
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")  # the only one of macOS and Windows
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_loader_processes_start_without_fork(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(SPAWN)
    line = f"program.py teach {SMALL} --model resnet8 --loader torch --workers 1 --out r".split()
    done = subprocess.run(
        [sys.executable, *line], cwd=tmp_path, capture_output=True, text=True, env=_environment(), check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_loader_can_be_sent_to_its_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Started without fork, a process gets the data set pickled."""
    from camkd_fast.data import choose
    from camkd_fast.data.augment import Augmentation
    from camkd_fast.data.batch import LoaderConfig
    from camkd_fast.train.config import DataConfig
    from camkd_fast.train.run_images import load_splits

    no_fork(monkeypatch)
    no_unix_signals(monkeypatch)
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (8, 8)).save(tmp_path / "train" / name / f"{i}.png")
    shutil.copytree(tmp_path / "train", tmp_path / "test")
    files = load_splits(DataConfig("folder", root=tmp_path, size=8, validation=0.0)).train
    arrays = load_splits(DataConfig()).validation
    for images in (arrays, files):
        for augmentation in (None, Augmentation(padding=1), Augmentation("resized-crop", 0, True)):
            loader: Any = choose.loader(images, LoaderConfig(8, augmentation=augmentation, workers=1), "torch")
            data, start = pickle.loads(pickle.dumps((loader._loader.dataset, loader._loader.worker_init_fn)))
            assert start.__name__ == "_keep_inherited"
            levels, index, problems = data[0, torch.tensor([1, 5])]
            assert torch.equal(levels, loader._loader.dataset[0, torch.tensor([1, 5])][0])
            assert index.tolist() == [1, 5] and not problems


def test_the_study_starts_its_processes_without_fork() -> None:
    from camkd_fast.experiments.study import conductor

    source = Path(conductor.__file__).read_text()
    assert 'get_context("spawn")' in source and "spawn" in multiprocessing.get_all_start_methods()


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
