"""Teachers named by a string: runs, zoo models with foreign weights, the user's functions, and how strings are read.

timm, torchvision and transformers are stand-ins here; `test_installed_sources.py` runs with the real ones.
"""

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
from torch import Tensor, nn

from camkd_fast import models
from camkd_fast.models import sources
from camkd_fast.models.foreign import parameter_names
from camkd_fast.models.model_file import CheckpointError, model_bytes
from camkd_fast.models.protocol import feature_model, predict
from camkd_fast.models.split import LogitsOnly, Split
from camkd_fast.train.teachers.live import LiveTeachers
from tests.support.models import with_random_norms

pytestmark = pytest.mark.usefixtures("one_thread")


def official(name: str, num_classes: int = 5) -> tuple[nn.Module, dict[str, Tensor]]:
    """A zoo model and its state under the official names."""
    model = with_random_norms(models.create(name, num_classes)).eval()
    return model, {key: model.state_dict()[ours] for key, ours in parameter_names(name).items()}


def same_logits(model: nn.Module, other: nn.Module, images: Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(model(images), other(images))


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
    assert str(info.value) == f"teacher resnet8@{tmp_path}/a.pth{options}: {reason}"


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("runs/none", r"^teacher runs/none does not exist: expected a run folder, NAME@FILE, timm:NAME, "),
        ("resnet8x3@a.pth", r"^teacher resnet8x3@a.pth: the zoo has no model 'resnet8x3'; nearest: resnet8x4"),
        ("resnet8@", r"^teacher 'resnet8@' lacks a name or a file$"),
        ("timm:", r"^teacher 'timm:' lacks a name or a file$"),
        ("", r"^teacher '' lacks a name or a file$"),
        ("py:module", r"^teacher py:module: expected py:package.module:function$"),
        ("py:os:", r"^teacher py:os:: expected py:package.module:function$"),
        ("py:no_such_module:f", r"^teacher py:no_such_module:f: No module named 'no_such_module'$"),
        ("py:os:no_such_function", r"^teacher py:os:no_such_function: os has no function 'no_such_function'$"),
        ("py:os:sep", r"^teacher py:os:sep: os has no function 'sep'$"),
        ("py:os:getcwd", r"^teacher py:os:getcwd must return an nn.Module, got str$"),
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
    with pytest.raises(ValueError, match="knowing has 4 classes, but 3 are needed"):
        sources.load(own + "knowing", 3)
    with pytest.raises(ValueError, match=r"wrong_names has 4 classes, but names for 1$"):
        sources.load(own + "wrong_names")
    with pytest.raises(ValueError, match=r"wrong_std: mean has 2 channels, but std 1$"):
        sources.load(own + "wrong_std")
    with pytest.raises(ValueError, match=r"late: No module named 'no_such_module_either'$"):
        sources.load(own + "late")


def test_maps_of_a_function(own: str) -> None:
    source = sources.load(own + "bare#conv?size=8")
    assert isinstance(source.model, Split) and (source.model.num_features, source.num_classes) == (5, 4)
    assert not isinstance(sources.load(own + "protocol").model, LogitsOnly)
    with pytest.raises(ValueError, match="Net has no module 'conv2'; nearest: conv"):
        sources.load(own + "bare#conv2")
    with pytest.raises(ValueError, match="bare#conv has 4 classes, but 5 are needed"):
        sources.load(own + "bare#conv", 5)


# --- stand-ins of optional packages ----------------------------------------------------------------------------------


class Classifier(nn.Module):
    """A model that follows timm's protocol and has names like torchvision's."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.num_features, self.num_classes = 6, num_classes
        self.pretrained_cfg: dict[str, Any] = {"classifier": "fc", "input_size": (3, 16, 16)}
        self.pretrained_cfg |= {"mean": (0.5, 0.25, 0.5), "std": (0.1, 0.2, 0.1)}
        self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes, self.fc = num_classes, nn.Linear(6, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def forward_head(self, features: Tensor) -> Tensor:
        return self.fc(features.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class Bare(nn.Module):
    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).mean((2, 3)))


def pinned(model: nn.Module) -> nn.Module:
    """The pretrained weights."""
    for p in model.parameters():
        nn.init.constant_(p, 0.125)
    return model


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = ModuleType("timm")
    module.fault = None
    weights = SimpleNamespace(has_weights=True, hf_hub_id="timm/net.in1k", url="")

    def config(name: str) -> Any:
        if name == "net.tag":
            raise RuntimeError("Invalid pretrained tag")
        return {"net.in1k": weights, "net.url": SimpleNamespace(has_weights=True, hf_hub_id=None, url="x.org/a")}.get(
            name
        )

    def create(name: str, pretrained: bool) -> nn.Module:
        if not pretrained:
            return Classifier()
        if module.fault is not None:
            raise module.fault
        return pinned(Classifier())

    data: Any = ModuleType("timm.data")
    data.infer_imagenet_subset = lambda model: "tiny" if model.num_classes == 3 else None
    data.ImageNetInfo = lambda subset: SimpleNamespace(label_names=lambda: ["n0", "n1", "n2"])
    module.is_model = lambda name: name.partition(".")[0] == "net"
    module.list_models = lambda: ["net"]
    module.list_pretrained = lambda: ["net.in1k"]
    module.get_pretrained_cfg, module.create_model = config, create
    monkeypatch.setitem(sys.modules, "timm", module)
    monkeypatch.setitem(sys.modules, "timm.data", data)
    return module


def test_timm_pretrained(timm: Any) -> None:
    source = sources.load("timm:net.in1k", 3)
    assert (source.mean, source.std, source.size) == ((0.5, 0.25, 0.5), (0.1, 0.2, 0.1), (16, 16))
    assert source.classes == ("n0", "n1", "n2") and source.model.num_features == 6 and not source.model.training
    assert all(torch.equal(p, torch.full_like(p, 0.125)) for p in source.model.parameters())
    assert isinstance(sources.load("timm:net.in1k#conv").model, Split)


@pytest.mark.parametrize("classes", [3, 7, 1])
def test_timm_with_a_file(timm: Any, tmp_path: Path, classes: int) -> None:
    model = Classifier(classes).eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "a.pth")
    source = sources.load(f"timm:net@{tmp_path}/a.pth", classes)
    assert source.num_classes == classes and source.classes is None and source.mean == (0.5, 0.25, 0.5)
    assert same_logits(source.model, model, torch.randn(2, 3, 16, 16))


def test_timm_refusals(timm: Any, tmp_path: Path) -> None:
    for name in ("net", "net.tag"):
        with pytest.raises(ValueError, match=rf"^timm has no pretrained weights '{name}'; nearest: net.in1k$"):
            sources.load(f"timm:{name}")
    with pytest.raises(ValueError, match=r"^timm has no model 'nets'; nearest: net$"):
        sources.load("timm:nets")
    torch.save(Bare().state_dict() | {"x": torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a.pth does not fit timm:net: timm:net has no x$"):
        sources.load(f"timm:net@{tmp_path}/a.pth")
    timm.fault = RuntimeError("weights_only=True blocked it. If it is trusted,\nretry")
    with pytest.raises(
        ValueError, match=r"^the weights of timm:net.in1k are refused or damaged: weights_only=True bl\S+ it$"
    ):
        sources.load("timm:net.in1k")
    timm.fault = FileNotFoundError("not in the cache\nof timm")
    for name, what in (("net.in1k", "model.safetensors of huggingface.co/timm/net.in1k"), ("net.url", "x.org/a")):
        with pytest.raises(ValueError) as info:
            sources.load(f"timm:{name}")
        assert str(info.value) == (
            f"the weights of timm:{name} are not in the cache and cannot be downloaded: download {what} on another "
            f"machine, copy it to any folder here, and give timm:{name}@FILE"
        )


class Weights(SimpleNamespace):
    """A member of torchvision's enumerations of weights."""

    name, url, offline, malicious = "IMAGENET1K_V2", "https://x.org/models/net-1234.pth", False, False

    def get_state_dict(self, **settings: Any) -> dict[str, Tensor]:
        assert settings == {"progress": False, "check_hash": True, "map_location": "cpu", "weights_only": True}
        if self.offline:
            raise URLError("Name or service not known")
        if self.malicious:
            raise pickle.UnpicklingError("Unsupported global")
        return pinned(Bare()).state_dict()

    def transforms(self) -> Any:
        return SimpleNamespace(crop_size=[20], mean=[0.5, 0.25, 0.5], std=[0.1, 0.2, 0.1])


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> Weights:
    member = Weights(meta={"categories": ["tench", "goldfish", "shark"]})
    module: Any = ModuleType("torchvision.models")
    module.list_models = lambda module: ["net"]
    module.get_model_weights = lambda name: SimpleNamespace(__members__={"IMAGENET1K_V2": member, "DEFAULT": member})

    def get_model(name: str, weights: Any, num_classes: int | None = None) -> nn.Module:
        assert weights is None or num_classes is None
        return Bare(num_classes or 3) if weights is None else pinned(Bare())

    module.get_model = get_model
    parent: Any = ModuleType("torchvision")
    parent.models = module
    monkeypatch.setitem(sys.modules, "torchvision", parent)
    monkeypatch.setitem(sys.modules, "torchvision.models", module)
    return member


def test_torchvision_pretrained(weights: Weights) -> None:
    source = sources.load("torchvision:net@IMAGENET1K_V2", 3)
    assert (source.mean, source.std, source.size) == ((0.5, 0.25, 0.5), (0.1, 0.2, 0.1), (20, 20))
    assert source.classes == ("tench", "goldfish", "shark") and not source.model.training
    assert isinstance(source.model, LogitsOnly) and source.num_classes == 3
    assert all(torch.equal(p, torch.full_like(p, 0.125)) for p in source.model.parameters())
    split = sources.load("torchvision:net@IMAGENET1K_V2#conv").model
    assert isinstance(split, Split) and split.num_features == 6


@pytest.mark.parametrize("classes", [3, 7])
def test_torchvision_with_a_file(weights: Weights, tmp_path: Path, classes: int) -> None:
    model = Bare(classes).eval()
    torch.save(model.state_dict(), tmp_path / "a.pth")
    source = sources.load(f"torchvision:net@{tmp_path}/a.pth", classes)
    assert (source.num_classes, source.classes, source.mean, source.size) == (classes, None, None, None)
    assert same_logits(source.model, model, torch.randn(2, 3, 16, 16))


def test_torchvision_refusals(weights: Weights) -> None:
    expected = "expected torchvision:net@FILE or torchvision:net@IMAGENET1K_V2$"
    with pytest.raises(ValueError, match=rf"^teacher torchvision:net: the weights are missing; {expected}"):
        sources.load("torchvision:net")
    with pytest.raises(
        ValueError, match=rf"^teacher torchvision:net: there are no weights and no file 'V3'; {expected}"
    ):
        sources.load("torchvision:net@V3")
    with pytest.raises(ValueError, match=r"^torchvision has no classifier 'nett'; nearest: net$"):
        sources.load("torchvision:nett@V3")
    weights.malicious = True
    with pytest.raises(ValueError, match=r"^the weights of torchvision:net@IMAGENET1K_V2 are refused or damaged: "):
        sources.load("torchvision:net@IMAGENET1K_V2")
    weights.offline = True
    with pytest.raises(ValueError) as info:
        sources.load("torchvision:net@IMAGENET1K_V2")
    assert str(info.value) == (
        "the weights of torchvision:net@IMAGENET1K_V2 are not in the cache and cannot be downloaded: download "
        f"https://x.org/models/net-1234.pth on another machine, copy it to {torch.hub.get_dir()}/checkpoints/"
        "net-1234.pth, and give torchvision:net@IMAGENET1K_V2 again"
    )


class Processor(SimpleNamespace):
    do_normalize, do_rescale, rescale_factor = True, True, 1 / 255
    image_mean, image_std, size = [0.5, 0.25, 0.5], [0.1, 0.2, 0.1], {"height": 16, "width": 24}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """transformers, with a model and an image processor that tests may replace by errors."""
    module: Any = ModuleType("transformers")
    net: Any = Bare()
    net.config = SimpleNamespace(num_labels=3, id2label={0: "a", 1: "b", 2: "c"})
    forward = net.forward
    net.forward = lambda pixel_values: SimpleNamespace(logits=forward(pixel_values))
    module.model, module.processor = net, Processor()

    def loader(attribute: str) -> Any:
        def from_pretrained(name: str, trust_remote_code: bool) -> Any:
            assert not trust_remote_code
            found = getattr(module, attribute)
            if isinstance(found, Exception):
                raise found
            return found

        return SimpleNamespace(from_pretrained=from_pretrained)

    module.AutoModelForImageClassification, module.AutoImageProcessor = loader("model"), loader("processor")
    monkeypatch.setitem(sys.modules, "transformers", module)
    return module


def test_transformers(hub: Any) -> None:
    source = sources.load("hf:org/net", 3)
    assert source.mean == pytest.approx((0.5, 0.25, 0.5)) and source.std == pytest.approx((0.1, 0.2, 0.1))
    assert source.size == (16, 24) and source.classes == ("a", "b", "c") and source.num_classes == 3
    assert isinstance(source.model, LogitsOnly) and not source.model.training
    assert source.model(torch.randn(2, 3, 16, 16)).shape == (2, 3)
    hub.model.half()
    assert {p.dtype for p in sources.load("hf:org/net").model.parameters()} == {torch.float32}
    hub.model.config.id2label = {i: f"LABEL_{i}" for i in range(3)}
    assert sources.load("hf:org/net").classes is None
    hub.model.config.id2label[0] = "a"
    assert sources.load("hf:org/net").classes is None  # two of three are placeholders
    hub.processor = FileNotFoundError("no preprocessor_config.json")
    source = sources.load("hf:org/net")
    assert (source.mean, source.std, source.size) == (None, None, None)


@pytest.mark.parametrize(
    ("settings", "mean", "std", "size"),
    [
        # (level / 127.5 - 1 - 0) / 1 with level = 255 u
        (
            {"rescale_factor": 1 / 127.5, "rescale_offset": True, "image_mean": [0.0], "image_std": [1.0]},
            0.5,
            0.5,
            None,
        ),
        ({"include_top": True, "image_mean": [0.5], "image_std": [0.2]}, 0.5, 0.04, None),
        ({"do_rescale": False, "image_mean": [127.5], "image_std": [51.0]}, 0.5, 0.2, None),
        ({"do_normalize": False}, 0.0, 1.0, None),
        ({"do_center_crop": True, "crop_size": {"height": 10, "width": 12}}, 0.5, 0.1, (10, 12)),
        ({"do_center_crop": True, "crop_size": None, "size": {"shortest_edge": 32}}, 0.5, 0.1, (32, 32)),
        ({"do_center_crop": False, "crop_size": {"height": 10, "width": 12}}, 0.5, 0.1, (16, 24)),
        ({"size": None}, 0.5, 0.1, "unknown"),
    ],
)
def test_preparation_by_image_processors(
    hub: Any, settings: dict[str, Any], mean: float, std: float, size: Any
) -> None:
    hub.processor.__dict__.update(settings)
    source = sources.load("hf:org/net")
    assert source.mean is not None and source.mean[0] == pytest.approx(mean)
    assert source.std is not None and source.std[0] == pytest.approx(std)
    assert source.size == {None: (16, 24), "unknown": None}.get(size, size)


def test_transformers_refusals(hub: Any, tmp_path: Path) -> None:
    hub.processor = ImportError("needs\nPillow")
    with pytest.raises(ValueError, match=r"^the image processor of hf:org/net cannot be used: needs Pillow$"):
        sources.load("hf:org/net")
    hub.model = pickle.UnpicklingError("Weights only load failed")
    with pytest.raises(
        ValueError, match=r"^the weights of hf:org/net are refused or damaged: Weights only load failed$"
    ):
        sources.load("hf:org/net")
    hub.model = ValueError("Unrecognized\nmodel")
    with pytest.raises(ValueError, match=r"^hf:org/net is no image classifier of transformers: Unrecognized model$"):
        sources.load("hf:org/net")
    hub.model = OSError("no network")
    with pytest.raises(ValueError, match=rf"^hf:{tmp_path} cannot be read: no network$"):
        sources.load(f"hf:{tmp_path}")
    with pytest.raises(ValueError) as info:
        sources.load("hf:org/net")
    assert str(info.value) == (
        "hf:org/net is no folder, and the hub's model is not in the cache and cannot be downloaded: download "
        "config.json, preprocessor_config.json and model.safetensors of huggingface.co/org/net on another machine, "
        "copy them to a folder here, and give hf:FOLDER"
    )


@pytest.mark.parametrize(
    ("spec", "package"),
    [("timm:a", "timm"), ("timm:a@f", "timm"), ("torchvision:a@B", "torchvision"), ("hf:a/b", "transformers")],
)
def test_missing_packages_name_the_extra(spec: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("timm", "torchvision", "torchvision.models", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ValueError, match=rf"needs {package}, which is not installed \(pip install 'camkd-fast\[teachers"
    ):
        sources.load(spec)
