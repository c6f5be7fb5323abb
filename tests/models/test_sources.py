"""Teachers named by a string: runs, zoo models with foreign weights, the user's functions, and how strings are read.

`test_source_packages.py` has those of timm, torchvision and transformers.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from camkd_fast import models
from camkd_fast.models import sources
from camkd_fast.models.model_file import CheckpointError, model_bytes
from camkd_fast.models.protocol import feature_model, predict
from camkd_fast.models.rep_distiller import parameter_names
from camkd_fast.models.split import LogitsOnly, Split
from camkd_fast.train.teachers.live import LiveTeachers
from tests.support.models import same_logits, with_random_norms

pytestmark = pytest.mark.usefixtures("one_thread")


def official(name: str, num_classes: int = 5) -> tuple[nn.Module, dict[str, Tensor]]:
    """A zoo model and its state under the official names."""
    model = with_random_norms(models.create(name, num_classes)).eval()
    return model, {key: model.state_dict()[ours] for key, ours in parameter_names(name).items()}


def run(folder: Path, **metadata: Any) -> nn.Module:
    """A finished run folder; returns its model."""
    folder.mkdir()
    model = with_random_norms(models.create("resnet8", 3, 1)).eval()
    known = {"model": "resnet8", "num_classes": 3, "in_channels": 1, "size": [8, 9], "mean": [51.0], "std": [25.5]}
    (folder / "model.safetensors").write_bytes(model_bytes(model, {**known, **metadata}))
    return model


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["", "/model.safetensors"])
def test_a_run_says_all_of_its_images(tmp_path: Path, form: str) -> None:
    model = run(tmp_path / "t0", class_names=["a", "b", "c"])
    source = sources.load(f"{tmp_path}/t0{form}", 3)
    assert (source.mean, source.std, source.size, source.classes) == ((0.2,), (0.1,), (8, 9), ("a", "b", "c"))
    assert source.num_classes == 3 and not source.model.training
    assert same_logits(source.model, model, torch.randn(2, 1, 8, 9))


@pytest.mark.parametrize("folder", ["at@home", "resnet8@x", "run#1", "what?size=3"])
def test_paths_with_special_characters_are_taken_whole(tmp_path: Path, folder: str) -> None:
    run(tmp_path / folder)
    source = sources.load(str(tmp_path / folder))
    assert source.classes is None and source.size == (8, 9)
    assert sources.load(f"{tmp_path / folder}?size=32").size == (32, 32)


def test_a_run_without_a_model_or_with_a_damaged_one(tmp_path: Path) -> None:
    (tmp_path / "t0").mkdir()
    with pytest.raises(FileNotFoundError, match=r"t0 has no trained model: .*model.safetensors does not exist"):
        sources.load(str(tmp_path / "t0"))
    run(tmp_path / "t1")
    file = tmp_path / "t1" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged"):
        sources.load(str(tmp_path / "t1"))


# --- zoo -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wrn_16_2", "wrn-16-2", "ShuffleV2", "vgg8"])
def test_a_zoo_model_with_official_weights(tmp_path: Path, name: str) -> None:
    model, state = official(name)
    torch.save({"epoch": 1, "model": state, "best_acc": torch.tensor(1.0)}, tmp_path / "a@b.pth")
    source = sources.load(f"{name}@{tmp_path}/a@b.pth", 5)
    assert (source.mean, source.std, source.size, source.classes) == (None, None, None, None)
    assert source.num_classes == 5 and not source.model.training
    assert same_logits(source.model, model, torch.randn(2, 3, 16, 16))


def test_the_options_say_what_a_file_does_not(tmp_path: Path) -> None:
    _, state = official("resnet8")
    torch.save(state, tmp_path / "a.pth")
    for options in (
        "#body.2?mean=0.5,0.25,1&std=0.2,0.2,0.5&size=16",
        "?mean=0.5,0.25,1&std=0.2,0.2,0.5&size=16#body.2",
    ):
        source = sources.load(f"resnet8@{tmp_path}/a.pth{options}")
        assert (source.mean, source.std, source.size) == ((0.5, 0.25, 1.0), (0.2, 0.2, 0.5), (16, 16))
        assert isinstance(source.model, Split) and source.model.num_features == 32
    assert sources.load(f"resnet8@{tmp_path}/a.pth?size=16,24").size == (16, 24)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("?mean=0.5", "mean and std belong together, got mean (0.5,) and std None"),
        ("?std=0.5", "mean and std belong together, got mean None and std (0.5,)"),
        ("?mean=0.5,0.5&std=1", "mean has 2 channels, but std 1"),
        ("?mean=0.5&std=0", "std must be positive, got (0.0,)"),
        ("?mean=0.5,0.5&std=1,nan", "std must be positive, got (1.0, nan)"),
        ("?mean=inf&std=1", "mean must be finite, got (inf,)"),
        ("?mean=a&std=1", "expected numbers separated by commas, got 'mean=a&std=1'"),
        ("?size=0", "size must be at least 1, got 0"),
        ("?size=1,2,3", "expected numbers separated by commas, got 'size=1,2,3'"),
        ("?crop=3", "the options are mean, std and size, got 'crop'"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, options: str, reason: str) -> None:
    torch.save(official("resnet8")[1], tmp_path / "a.pth")
    with pytest.raises(ValueError) as info:
        sources.load(f"resnet8@{tmp_path}/a.pth{options}")
    assert str(info.value) == f"source resnet8@{tmp_path}/a.pth{options}: {reason}"


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("runs/none", r"^source runs/none does not exist: expected a run folder, NAME@FILE, timm:NAME, "),
        ("resnet8x3@a.pth", r"^source resnet8x3@a.pth: the zoo has no model 'resnet8x3'; nearest: resnet8x4"),
        ("resnet8@", r"^source 'resnet8@' lacks a name or a file$"),
        ("timm:", r"^source 'timm:' lacks a name or a file$"),
        ("", r"^source '' lacks a name or a file$"),
        ("py:module", r"^source py:module: expected py:package.module:function$"),
        ("py:os:", r"^source py:os:: expected py:package.module:function$"),
        ("py:no_such_module:f", r"^source py:no_such_module:f: No module named 'no_such_module'$"),
        ("py:os:no_such_function", r"^source py:os:no_such_function: os has no function 'no_such_function'$"),
        ("py:os:sep", r"^source py:os:sep: os has no function 'sep'$"),
        ("py:os:getcwd", r"^source py:os:getcwd must return an nn.Module, got str$"),
    ],
)
def test_strings_of_no_form_are_refused(spec: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        sources.load(spec)


def test_a_missing_file_and_another_number_of_classes(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sources.load(f"resnet8@{tmp_path}/none.pth")
    torch.save(official("resnet8")[1], tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a.pth has 5 classes, but 4 are needed$"):
        sources.load(f"resnet8@{tmp_path}/a.pth", 4)


def test_random_numbers_stay_as_they_are(tmp_path: Path) -> None:
    torch.save(official("resnet8")[1], tmp_path / "a.pth")
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    sources.load(f"resnet8@{tmp_path}/a.pth")
    assert torch.equal(torch.rand(3), expected)


# --- the user's functions --------------------------------------------------------------------------------------------

MODULE = """
import torch
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 5, 3, padding=1), nn.Linear(5, 4)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))

def bare():
    return Net()

def knowing():
    net = Net()
    net.mean, net.std, net.size, net.classes, net.num_classes = 0.5, [0.25], 12, ["a", "b", "c", "d"], 4
    return net

def normalising():
    net = Net()
    net.register_buffer("mean", torch.zeros(1, 1, 1, 1))
    net.register_buffer("std", torch.ones(1, 1, 1, 1))
    return net

def wrong_names():
    net = Net()
    net.classes, net.num_classes = ["a"], 4
    return net

def wrong_std():
    net = Net()
    net.mean, net.std = (0.5, 0.5), (0.1,)
    return net

def protocol():
    from camkd_fast import models
    return models.create("resnet8", 4, 1)

def late():
    import no_such_module_either

def runtime_error():
    raise RuntimeError("no weights\\nthere")

def key_error():
    return {}["net"]

def missing_file():
    return open("nowhere.pth")

def exiting():
    raise SystemExit

def arguments(path):
    return Net()

def odd(**attributes):
    net = Net()
    for name, value in attributes.items():
        setattr(net, name, value)
    return net

def odd_mean():
    return odd(mean=("a",), std=(1,))

def odd_std():
    return odd(mean=(1,), std=[None])

def odd_size():
    return odd(size=(1, 2, 3))

def odd_classes():
    return odd(classes=4)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current folder, which is not on the path; its source string without the function."""
    monkeypatch.chdir(tmp_path)
    name = f"own_{os.getpid()}_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    return f"py:{name}:"


def test_what_a_function_returns(own: str) -> None:
    before = list(sys.path)
    source = sources.load(own + "bare", 4)  # it does not say its number of classes
    assert sys.path == before
    assert isinstance(source.model, LogitsOnly) and not source.model.training and source.num_classes is None
    assert source.model.reason == f"no module of {own}bare is named for it, as in {own}bare#MODULE"
    assert (source.mean, source.std, source.size, source.classes) == (None, None, None, None)
    _, logits = predict(feature_model(source.model), torch.randn(2, 1, 8, 8))
    assert logits.shape == (2, 4)


def test_a_model_without_a_map_teaches_by_its_logits(own: str) -> None:
    source = sources.load(own + "bare")
    teachers = LiveTeachers([models.freeze(source.model)], num_classes=4)
    images = torch.randn(2, 1, 8, 8)
    (prediction,) = teachers.outputs(images)
    assert teachers.num_features == [0] and torch.equal(prediction.logits, source.model(images))


def test_attributes_and_options_of_a_function(own: str) -> None:
    source = sources.load(own + "knowing", 4)
    assert (source.mean, source.std, source.size, source.classes) == ((0.5,), (0.25,), (12, 12), ("a", "b", "c", "d"))
    assert source.num_classes == 4
    assert sources.load(own + "knowing?mean=0.1&std=0.3").mean == (0.1,)
    assert sources.load(own + "normalising").mean is None  # part of the model
    assert sources.load(own + "knowing", 3).num_classes == 4  # three of the four can be chosen by name
    with pytest.raises(ValueError, match="knowing has 4 classes, but 5 are needed"):
        sources.load(own + "knowing", 5)
    with pytest.raises(ValueError, match=r"wrong_names has 4 classes, but names for 1$"):
        sources.load(own + "wrong_names")
    with pytest.raises(ValueError, match=r"wrong_std: mean has 2 channels, but std 1$"):
        sources.load(own + "wrong_std")
    with pytest.raises(ValueError, match=r"late: No module named 'no_such_module_either'$"):
        sources.load(own + "late")


@pytest.mark.parametrize(
    ("function", "words", "cause"),
    [
        ("runtime_error", r"runtime_error raised RuntimeError: no weights\nthere$", RuntimeError),
        ("key_error", r"key_error raised KeyError: 'net'$", KeyError),
        ("missing_file", r"missing_file raised FileNotFoundError: .*nowhere.pth'$", FileNotFoundError),
        ("exiting", r"exiting raised SystemExit$", SystemExit),
        ("arguments", r"arguments raised TypeError: arguments\(\) missing 1 required positional argument", TypeError),
        ("odd_mean", r"odd_mean: mean of its model is \('a',\): could not convert", ValueError),
        ("odd_std", r"odd_std: std of its model is \[None\]: float\(\) argument", TypeError),
        ("odd_size", r"odd_size: size of its model is \(1, 2, 3\): too many values", ValueError),
        ("odd_classes", r"odd_classes: classes of its model is 4: 'int' object is not iterable", TypeError),
    ],
)
def test_errors_of_a_function_name_the_source(own: str, function: str, words: str, cause: type[Exception]) -> None:
    with pytest.raises(ValueError, match=rf"^source {own}{words}") as error:
        sources.load(own + function)
    assert isinstance(error.value.__cause__, cause)


@pytest.mark.parametrize(("line", "error"), [("1 +", "SyntaxError"), ("1 / 0", "ZeroDivisionError: division by zero")])
def test_errors_of_a_module_name_the_source(own: str, line: str, error: str) -> None:
    name = f"{own.split(':')[1]}_{error[:4]}"
    Path(f"{name}.py").write_text(line)
    with pytest.raises(ValueError, match=f"^source py:{name}:net raised {error}"):
        sources.load(f"py:{name}:net")


def test_maps_of_a_function(own: str) -> None:
    source = sources.load(own + "bare#conv?size=8")
    assert isinstance(source.model, Split) and (source.model.num_features, source.num_classes) == (5, 4)
    assert not isinstance(sources.load(own + "protocol").model, LogitsOnly)
    with pytest.raises(ValueError, match="Net has no module 'conv2'; nearest: conv"):
        sources.load(own + "bare#conv2")
    with pytest.raises(ValueError, match="bare#conv has 4 classes, but 5 are needed"):
        sources.load(own + "bare#conv", 5)
