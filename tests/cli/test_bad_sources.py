"""Teachers and initial weights that cannot be used: one line with the reason and what to do, and no run folder."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.error import URLError

import pytest
import torch

from camkd_fast import cli, models
from camkd_fast.models.model_file import model_bytes
from camkd_fast.models.rep_distiller import parameter_names

pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--data", "digits", "--images", "10", "--epochs", "1", "--no-progress", "--no-tensorboard", "--out", "r"]
MODULE = """
import torch
from torch import nn

def crashing():
    return nn.Sequential(nn.Flatten(), nn.Linear(81, 10))

def wrong_class():
    return torch.nn.Conv3d

def raising():
    raise RuntimeError("no weights\\nthere")
"""


class Trap:
    """Creates a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("trap",)


def state(name: str = "resnet8", classes: int = 10, channels: int = 1) -> dict[str, torch.Tensor]:
    model = models.create(name, classes, channels)
    return {official: model.state_dict()[ours] for official, ours in parameter_names(name).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Damaged, misleading and good files."""
    made = tmp_path_factory.mktemp("sources")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        write_files()
    return made


@pytest.fixture(autouse=True)
def _here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def write_files() -> None:
    Path("text.pth").write_text("no checkpoint\n")
    Path("empty.pth").touch()
    Path("pickle.pth").write_bytes(pickle.dumps(Trap()))
    torch.save({"model": Trap()}, "code.pth")
    torch.save(models.create("resnet8", 10, 1), "whole.pth")
    good = state()
    torch.save(good, "good.pth")
    torch.save({key: t for key, t in good.items() if not key.startswith("layer2")}, "missing.pth")
    torch.save({**good, **{f"extra.{i}": torch.zeros(1) for i in range(13)}}, "extra.pth")
    torch.save(state(classes=7), "seven.pth")
    torch.save(state(channels=3, classes=10), "colour.pth")
    torch.save(state(channels=2, classes=10), "two.pth")
    cut = Path("good.pth").read_bytes()
    Path("cut.pth").write_bytes(cut[: len(cut) // 2])
    Path("bad_models.py").write_text(MODULE)
    Path("unfinished").mkdir()
    for folder, names in (("letters", list("abcdefghij")), ("fewer", list("01234567"))):
        Path(folder).mkdir()
        known = {
            "model": "resnet8",
            "num_classes": len(names),
            "in_channels": 1,
            "size": [8, 8],
            "mean": [1],
            "std": [1],
        }
        content = model_bytes(models.create("resnet8", len(names), 1), {**known, "class_names": names})
        (Path(folder) / "model.safetensors").write_bytes(content)
    Path("map.json").write_text('{"0": 0}')


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert cli.main(words) == 1
    error = capsys.readouterr().err
    assert error.startswith("camkd-fast: ") and error.count("\n") == 1 and "Traceback" not in error, error
    assert not Path("r").exists() and not Path("trap").exists()
    return error


FILES = [
    ("nowhere", "source nowhere does not exist: expected a run folder, NAME@FILE, timm:NAME, "),
    ("unfinished", "source unfinished has no trained model: unfinished/model.safetensors does not exist"),
    ("resnet8@none.pth", "none.pth: No such file or directory"),
    (
        "resnet8@text.pth",
        "text.pth begins with b'no checkpoint\\n': expected a checkpoint written by torch.save, or a safet",
    ),
    ("resnet8@empty.pth", "empty.pth is empty: expected a checkpoint"),
    ("resnet8@cut.pth", "cut.pth is truncated or damaged"),
    ("resnet8@pickle.pth", "pickle.pth is a pickle of another program"),
    (
        "resnet8@code.pth",
        "code.pth is refused, because it names code (posix.mkdir): save the model's state_dict() with",
    ),
    (
        "resnet8@whole.pth",
        "whole.pth is a whole pickled model (camkd_fast.models.resnet.ResNet), which cannot be read wi",
    ),
    ("resnet8@missing.pth", "missing.pth does not fit resnet8: it lacks layer2.0.conv1.weight, layer2.0.bn1.weight, "),
    (
        "resnet8@extra.pth",
        "resnet8 has no extra.0, extra.1, extra.2, extra.3, extra.4, extra.5, extra.6, extra.7, extra",
    ),
    ("vgg8@good.pth", "good.pth does not fit vgg8: it lacks block0.0.weight, "),
    ("resnet8x4@good.pth", "good.pth does not fit resnet8x4: "),
    ("resnet9@good.pth", "the zoo has no model 'resnet9'; nearest: resnet8"),
    ("py:bad_models:nothing", "bad_models has no function 'nothing'"),
    ("py:bad_models:raising", "source py:bad_models:raising raised RuntimeError: no weights there\n"),
    ("py:bad_models:wrong_class", "must return an nn.Module, got type"),
]


@pytest.mark.parametrize(("source", "words"), FILES)
@pytest.mark.parametrize("option", ["--teachers", "--init"])
def test_a_source_that_cannot_be_loaded(
    source: str, words: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if option == "--teachers":
        assert words in refused(["distill", option, "resnet8@good.pth", source, "--student", "resnet8", *SMALL], capsys)
    else:
        assert words in refused(["teach", option, source, "--model", "resnet8", *SMALL], capsys)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["resnet8@seven.pth"],
            "seven.pth has 7 classes, but the student's images have 10, and its names are unknown: g",
        ),
        (
            ["letters"],
            "letters knows 10 classes, such as 'a' and 'b', but the images have 10, such as '0' and '1': give",
        ),
        (["fewer"], "fewer knows 8 classes, such as '0' and '1', but the images have 10, such as '8' and '9'"),
        (
            ["resnet8@two.pth"],
            "two.pth cannot take the student's images of shape (1, 8, 8): Given groups=1, weight of",
        ),
        (
            ["py:bad_models:crashing", "--strategy", "aver"],
            "crashing cannot take the student's images of shape (1, 8, 8): ",
        ),
        (["resnet8@good.pth#nowhere"], "has no module 'nowhere'; nearest: "),
        (["resnet8@good.pth?std=1"], "mean and std belong together, got mean None and std (1.0,)"),
        (["letters", "--class-map", "map.json"], "map.json lacks class '1', '2', '3' and 6 more of the images"),
        (["letters", "--class-map", "none.json"], "none.json: No such file or directory"),
        (
            ["py:bad_models:crashing?size=9"],
            "ca-mkd needs feature maps, but teacher py:bad_models:crashing?size=9 has none",
        ),
    ],
)
def test_a_teacher_that_does_not_fit(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in refused(["distill", "--student", "resnet8", "--teachers", *words, *SMALL], capsys)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "resnet8@colour.pth",
            "colour.pth does not fit resnet8: conv1.weight has shape (16, 3, 3, 3), but resnet8 needs",
        ),
        (
            "resnet8@good.pth#body.2",
            "initial weights resnet8@good.pth#body.2 are those of a whole model: leave out the",
        ),
        ("vgg8", "source vgg8 does not exist"),
    ],
)
def test_weights_that_do_not_fit(source: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(["teach", "--init", f"{source}", "--model", "resnet8", *SMALL], capsys)
    assert words in error.replace("body.0.0.weight", "conv1.weight")


# --- packages --------------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm, torchvision and transformers whose downloads fail."""

    def fail(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect to\nthe hub")

    def unknown(**_: object) -> None:
        raise URLError("Name or service not known")

    hub: Any = ModuleType("transformers")
    hub.AutoModelForImageClassification = SimpleNamespace(from_pretrained=fail)
    weights = SimpleNamespace(name="V1", url="https://x.org/net-12.pth", get_state_dict=unknown)
    vision: Any = ModuleType("torchvision.models")
    vision.list_models = lambda module: ["net"]
    vision.get_model_weights = lambda name: SimpleNamespace(__members__={"V1": weights})
    parent: Any = ModuleType("torchvision")
    parent.models = vision
    timm = SimpleNamespace(
        is_model=lambda name: True,
        get_pretrained_cfg=lambda name: SimpleNamespace(has_weights=True, hf_hub_id="timm/net", url=""),
        create_model=fail,
    )
    modules = {"timm": timm, "torchvision": parent, "torchvision.models": vision, "transformers": hub}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "download", "then"),
    [
        ("timm:net", "download model.safetensors of huggingface.co/timm/net on another machine", "give timm:net@FILE"),
        ("torchvision:net@V1", "download https://x.org/net-12.pth on another machine", "give torchvision:net@V1 again"),
        ("hf:org/net", "preprocessor_config.json and model.safetensors of huggingface.co/org/net", "give hf:FOLDER"),
    ],
)
def test_a_hub_without_a_network(
    source: str, download: str, then: str, offline: None, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(["distill", "--student", "resnet8", "--teachers", source, *SMALL], capsys)
    assert download in error and error.rstrip().endswith(then)


@pytest.mark.parametrize("source", ["timm:net", "torchvision:net@V1", "hf:org/net"])
@pytest.mark.parametrize("command", ["distill", "teach", "teachers"])
def test_a_missing_package_names_the_extra(
    source: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("timm", "torchvision", "torchvision.models", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    words = {
        "distill": ["--student", "resnet8", "--teachers", source, *SMALL],
        "teach": ["--model", "resnet8", "--init", source, *SMALL],
        "teachers": [source],
    }
    error = refused([command, *words[command]], capsys)
    package = {"timm": "timm", "torc": "torchvision", "hf:o": "transformers"}[source[:4]]
    assert f"needs {package}, which is not installed (pip install 'camkd-fast[teachers]')" in error


def test_good_files_are_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    """Of the same folder: the refusals above have the reasons that they say."""
    line = ["teachers", "resnet8@good.pth", "resnet8@colour.pth", "letters", "--class-map", "m.yaml"]
    Path("m.yaml").write_text("letters: {" + ", ".join(f"'{i}': {i}" for i in range(10)) + "}")
    assert cli.main(line) == 0
