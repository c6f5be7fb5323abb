"""The recipe of docs/training.md on small JPEG files: killed at any step it ends as it would have."""

from __future__ import annotations

import random
import re
import shlex
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from camkd_fast.cli import options
from camkd_fast.models.model_file import AVERAGED_MODEL, MODEL
from camkd_fast.train import journal
from camkd_fast.train.config import DataConfig, DistillConfig, LogConfig, OptimConfig, TeachConfig
from camkd_fast.train.journal import METRICS, read_metrics
from camkd_fast.train.run import distill, teach
from tests.support.loader_data import picture
from tests.support.training import EAGER
from tests.train.test_checkpoint import ROOT, Killed, kill_after, lines, records

pytestmark = pytest.mark.usefixtures("one_thread")
DOCS = ROOT / "docs" / "training.md"
QUIET = LogConfig(tensorboard=False, progress=False, log_every=1, checkpoint_every=1)
RECIPE = {
    *("optimizer", "decay_norms", "clip_grad", "ema", "label_smoothing", "mixup", "cutmix", "schedule", "warmup"),
    *("rand_augment", "random_erasing", "augmentation"),
}
STEPS = 2 * 4  # of 64 images


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 30 files, of which 64 are for training, and a teacher of them."""
    folder = tmp_path_factory.mktemp("recipe")
    generator = np.random.default_rng(0)
    for name in ("ant", "bee", "cat"):
        (folder / "images" / name).mkdir(parents=True)
        for n in range(30):
            height, width = generator.integers(24, 60, 2).tolist()
            picture(generator, height, width).save(folder / "images" / name / f"{n}.jpg")
    config = recipe(folder / "unused", "torch", "adamw")
    optim = replace(config.optim, epochs=1)
    teach(TeachConfig("resnet8", out=folder / "teacher", data=config.data, optim=optim, log=QUIET))
    return folder


def documented() -> DistillConfig:
    """The settings of the documented command."""
    block = re.search(r"^camkd-fast (distill [^`]*--rand-augment [^`]*)^```", DOCS.read_text(), re.MULTILINE)
    assert block is not None
    command = options.parse(shlex.split(block[1].replace("\\\n", " ")))
    assert isinstance(command, options.Distill)
    return command.settings


def recipe(out: Path, loader: str, optimizer: str) -> DistillConfig:
    """Likewise, in a few seconds."""
    settings = documented()
    data = replace(settings.data, root=out.parent / "images", size=24, images=64, loader=loader, workers=1)
    optim = replace(settings.optim, epochs=2, batch_size=16, warmup=0.5, ema=0.9, optimizer=optimizer)
    teachers = (out.parent / "teacher",)
    return replace(
        settings, student="resnet8", teachers=teachers, out=out, data=data, optim=optim, precision=EAGER, log=QUIET
    )


def whole(root: Path, loader: str, optimizer: str) -> Path:
    """The run that nothing interrupts."""
    out = root / f"{loader}-{optimizer}"
    if not out.exists():
        result = distill(recipe(out, loader, optimizer))
        assert result.averaged is not None and lines(out) == STEPS + 1
    return out


def assert_same(out: Path, expected: Path) -> None:
    for name in (MODEL, AVERAGED_MODEL):
        assert (out / name).read_bytes() == (expected / name).read_bytes(), name
    assert records(out)[:-1] == records(expected)[:-1]


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """End the run right after the record of a step."""
    write = journal.Journal.write

    def last(self: journal.Journal, record: Any) -> None:
        write(self, record)
        if record["step"] == step:
            raise Killed

    monkeypatch.setattr(journal.Journal, "write", last)


def test_the_documented_recipe_has_every_option() -> None:
    settings = documented()
    for of, default in ((settings.optim, OptimConfig()), (settings.data, DataConfig())):
        for name in RECIPE & {field.name for field in fields(of)}:
            assert getattr(of, name) != getattr(default, name), name
    section = DOCS.read_text().partition("## Recipes")[2].partition("\n## ")[0]
    for name in RECIPE:
        assert re.search(rf"--(no-)?{name.replace('_', '-')}\b", section), name


@pytest.mark.parametrize(
    ("loader", "optimizer"), [("torch", "adamw"), pytest.param("dali", "muon", marks=pytest.mark.slow)]
)
def test_an_interrupted_recipe_ends_the_same(
    root: Path, loader: str, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, out = whole(root, loader, optimizer), root / f"interrupted-{loader}"
    for step in (2, 5):
        with monkeypatch.context() as patch:
            kill_at(patch, step)
            with pytest.raises(Killed):
                distill(recipe(out, loader, optimizer), resume=True)
    distill(recipe(out, loader, optimizer), resume=True)
    assert_same(out, expected)
    (epoch, *_) = read_metrics(out / METRICS, "epoch")
    assert {"validation_accuracy", "ema_validation_accuracy"} <= set(epoch)


JOB = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.train.test_recipe import recipe
from camkd_fast.train.run import distill
distill(recipe(Path(sys.argv[1]), *sys.argv[2:]), resume=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("loader", "optimizer"), [("torch", "adamw"), ("dali", "muon")])
def test_a_recipe_killed_five_times_ends_byte_identical(root: Path, loader: str, optimizer: str) -> None:
    expected, out = whole(root, loader, optimizer), root / f"killed-{loader}-{optimizer}"
    generator = random.Random(5)

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", JOB, str(out), loader, optimizer]
        return subprocess.Popen(command, text=True, stderr=subprocess.PIPE, cwd=ROOT)

    for count in (1, 3, 4, 6, 7):
        process = start()
        assert kill_after(process, out, count, generator)
    process = start()
    assert process.wait(timeout=120) == 0, process.stderr.read()  # type: ignore[union-attr]
    assert_same(out, expected)
