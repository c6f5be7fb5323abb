"""`camkd-fast teachers`: what the table says of each source, and how much the sources agree."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from camkd_fast import cli, models
from camkd_fast.data import LabelledImages
from camkd_fast.data.splits import Splits
from camkd_fast.experiments import teacher_table
from camkd_fast.models.model_file import model_bytes
from camkd_fast.train import run_images
from camkd_fast.train.config import DataConfig
from camkd_fast.train.source_strings import SourceString
from tests.support.models import with_random_norms

pytestmark = pytest.mark.usefixtures("one_thread")
MEAN, STD = (120.0, 110.0, 100.0), (60.0, 65.0, 70.0)
MODULE = """
from torch import nn

class Net(nn.Module):
    num_classes = 3

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))
"""


def images(N: int, seed: int) -> LabelledImages:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (N, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return LabelledImages(pixels, torch.arange(N) % 3, 3, MEAN, STD, ("a", "b", "c"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs and a module, and a data set of their classes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table_models.py").write_text(MODULE)
    for k, names in enumerate((["a", "b", "c"], ["c", "a", "b"])):
        known = {"model": "resnet8", "num_classes": 3, "in_channels": 3, "size": [8, 8], "class_names": names}
        (tmp_path / f"t{k}").mkdir()
        content = model_bytes(model(k), {**known, "mean": MEAN, "std": STD})
        (tmp_path / f"t{k}" / "model.safetensors").write_bytes(content)
    parts = Splits(images(9, 0), images(21, 1), images(8, 2))

    def load(name: str, root: Path | None, *, validation: float, **_: object) -> Splits:
        return parts if validation else parts._replace(validation=images(0, 0))

    monkeypatch.setattr(run_images.catalogue, "load", load)
    return tmp_path


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return with_random_norms(models.create("resnet8", 3)).eval()


@torch.no_grad()
def answers(k: int, data: LabelledImages) -> torch.Tensor:
    logits = model(k)(data.normalise(data.pixels))
    return logits[:, [0, 1, 2] if k == 0 else [1, 2, 0]].argmax(1)


@pytest.mark.parametrize("batch_size", [4, 256])
def test_accuracy_and_agreement_are_those_of_the_models(here: Path, batch_size: int) -> None:
    found = teacher_table.compare_teachers(
        [SourceString("t0"), SourceString("t1"), SourceString("t0")], DataConfig(), batch_size=batch_size, device="cpu"
    )
    data = images(21, 1)
    first, second = answers(0, data), answers(1, data)
    assert (found.split, found.images) == ("validation", 21)
    right = [float((answer == data.labels).double().mean()) for answer in (first, second)]
    assert [teacher.accuracy for teacher in found.teachers] == [*right, right[0]]
    equal = float((first == second).double().mean())
    assert found.agreement == [[1, equal, 1], [equal, 1, equal], [1, equal, 1]]
    assert all(teacher.images_per_second > 0 for teacher in found.teachers)
    assert [teacher.parameters for teacher in found.teachers] == [sum(p.numel() for p in model(0).parameters())] * 3


@pytest.mark.parametrize(
    ("split", "validation", "expected"),
    [
        ("auto", 0.1, ("validation", 21)),
        ("auto", 0.0, ("test", 8)),
        ("train", 0.1, ("train", 9)),
        ("test", 0.1, ("test", 8)),
    ],
)
def test_the_split(here: Path, split: str, validation: float, expected: tuple[str, int]) -> None:
    found = teacher_table.compare_teachers([SourceString("t0")], DataConfig(validation=validation), split)
    assert (found.split, found.images) == expected


def test_the_command_prints_the_tables(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = "py:table_models:Net?size=9,10"
    assert cli.main(["teachers", "t0", net, "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "21 validation images of digits"
    header, _, first, second = (line.split("  ") for line in lines[2:6])
    assert [cell.strip() for cell in header if cell] == [
        *("teacher", "model", "parameters", "classes", "size", "mean", "std", "map channels", "accuracy", "images/s")
    ]
    assert [cell.strip() for cell in first if cell][:8] == [
        *("t0", "resnet8", f"{sum(p.numel() for p in model(0).parameters()):,}", "3", "8x8"),
        *("0.4706 0.4314 0.3922", "0.2353 0.2549 0.2745", "64"),
    ]
    assert [cell.strip() for cell in second if cell][1:8] == ["Net", "96", "3", "9x10", "unknown", "unknown", "none"]
    assert lines[7].startswith("equal predictions") and lines[9].split()[:3] == ["t0", "100.0", "%"]
    assert lines[12:] == [
        f"{net} has no feature map: no module of {net} is named for it, as in py:table_models:Net#MODULE",
        f"{net} gets images with the data's mean and std, as its own are unknown",
    ]
    assert cli.main(["teachers", "t0"]) == 0
    assert "equal predictions" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("teachers", "teachers compares one or more sources, got none"),
        ("teachers t0 nowhere", "source nowhere does not exist: expected a run folder"),
        ("teachers t0 --validation 0 --split validation", "the validation part of digits is empty"),
        ("teachers t0 --class-map none.json", "none.json: No such file or directory"),
    ],
)
def test_bad_input_is_one_line(here: Path, line: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(line.split()) == 1
    error = capsys.readouterr().err
    assert error.startswith("camkd-fast: ") and words in error and error.count("\n") == 1
