"""Teachers of timm, torchvision and transformers, which are stand-ins here.

`test_installed_sources.py` runs with the real ones.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, nn

from camkd_fast.models import sources
from camkd_fast.models.split import LogitsOnly, Split
from tests.support.models import same_logits

pytestmark = pytest.mark.usefixtures("one_thread")


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
    with pytest.raises(ValueError, match=rf"^source torchvision:net: the weights are missing; {expected}"):
        sources.load("torchvision:net")
    with pytest.raises(
        ValueError, match=rf"^source torchvision:net: there are no weights and no file 'V3'; {expected}"
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
