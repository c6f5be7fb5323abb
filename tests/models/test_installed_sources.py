"""Teachers of timm, torchvision and transformers themselves, where they are installed. Nothing is downloaded.

Their caches are filled with random weights under the published names.
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
from camkd_fast.models.protocol import feature_model, predict
from camkd_fast.models.split import LogitsOnly, Split

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def check(source: sources.Source, model: nn.Module, side: int) -> None:
    """The source has the model's logits, also frozen, and a map if it says so."""
    images = torch.randn(2, 3, side, side)
    features, logits = predict(feature_model(source.model), images)
    assert torch.equal(logits, model.eval()(images))
    assert features.shape[1] == (source.model.num_features or 3)
    frozen = models.freeze(source.model)(images)
    assert (frozen - logits).norm() <= 1e-5 * logits.norm()


# --- timm ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, which is offline."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def cached_by_timm(hub_cache: Path, name: str) -> nn.Module:
    """A timm model whose random weights are in the cache as the published ones."""
    from safetensors.torch import save_file

    timm = pytest.importorskip("timm")
    model: nn.Module = timm.create_model(name, pretrained=False)
    repository = hub_cache / f"models--{timm.get_pretrained_cfg(name).hf_hub_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    save_file({key: t.contiguous() for key, t in model.state_dict().items()}, snapshot / "model.safetensors")
    return model


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("test_resnet.r160_in1k", None),
        ("test_convnext.r160_in1k", None),
        ("test_efficientnet.r160_in1k", None),
        ("test_vit.r160_in1k", LogitsOnly),  # its head reads the class token
        ("test_resnet.r160_in1k#layer3", Split),
    ],
)
def test_timm_with_its_weights(hub_cache: Path, name: str, kind: type | None) -> None:
    model = cached_by_timm(hub_cache, name.partition("#")[0])
    source = sources.load(f"timm:{name}", 1000)
    assert type(source.model) is (kind or type(model))
    config: Any = model.pretrained_cfg
    assert (source.mean, source.std, source.size) == (config["mean"], config["std"], (160, 160))
    assert source.classes is not None and source.classes[:2] == ("n01440764", "n01443537")
    check(source, model, 160)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_mambaout", "test_nfnet"])
def test_timm_with_a_file(hub_cache: Path, tmp_path: Path, name: str) -> None:
    model = pytest.importorskip("timm").create_model(name, pretrained=False, num_classes=7)
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{key}": t for key, t in model.state_dict().items()}}, tmp_path / "a"
    )
    source = sources.load(f"timm:{name}@{tmp_path}/a", 7)
    assert source.classes is None and source.size == (160, 160)
    check(source, model, 160)


def test_timm_without_a_network(hub_cache: Path) -> None:
    pytest.importorskip("timm")
    with pytest.raises(
        ValueError, match=r"download model.safetensors of huggingface.co/timm/resnet18.a1_in1k on another"
    ):
        sources.load("timm:resnet18.a1_in1k")
    with pytest.raises(ValueError, match=r"^timm has no pretrained weights 'resnet18.a9'; nearest: .*resnet18.a1_in1k"):
        sources.load("timm:resnet18.a9")


@pytest.mark.parametrize("name", ["crossvit_9_240", "crossvit_tiny_240"])
def test_timm_models_with_several_tensors_as_features(tmp_path: Path, name: str) -> None:
    model = pytest.importorskip("timm").create_model(name, pretrained=False, num_classes=7)
    torch.save(model.state_dict(), tmp_path / "a")
    source = sources.load(f"timm:{name}@{tmp_path}/a", 7)
    assert isinstance(source.model, LogitsOnly) and "a list of 2 tensors" in source.model.reason
    check(source, model, 240)
    assert isinstance(models.create(f"timm:{name}", 7), LogitsOnly)


# --- torchvision -----------------------------------------------------------------------------------------------------


@pytest.fixture
def torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """torchvision.models, with torch's cache in a folder of the test and no network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    return pytest.importorskip("torchvision.models")


def cached_by_torchvision(torchvision: Any, name: str) -> nn.Module:
    model: nn.Module = torchvision.get_model(name, weights=None)
    url = torchvision.get_model_weights(name)["IMAGENET1K_V1"].url
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(model.state_dict(), folder / url.rpartition("/")[2])
    return model


@pytest.mark.parametrize(
    ("name", "layer", "channels"),
    [
        ("squeezenet1_1", "features", 512),
        ("mobilenet_v3_small", "features", 576),
        ("shufflenet_v2_x0_5", "conv5", 1024),
        ("resnet18", "layer4", 512),
        ("densenet121", "features", 1024),
    ],
)
def test_torchvision_with_its_weights(torchvision: Any, name: str, layer: str, channels: int) -> None:
    model = cached_by_torchvision(torchvision, name)
    source = sources.load(f"torchvision:{name}@IMAGENET1K_V1#{layer}", 1000)
    assert isinstance(source.model, Split) and source.model.num_features == channels
    assert (source.mean, source.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert source.size == (224, 224) and source.classes is not None and source.classes[:2] == ("tench", "goldfish")
    check(source, model, 64)


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "googlenet", "swin_t", "mnasnet0_5"])
@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
def test_torchvision_with_a_file(torchvision: Any, tmp_path: Path, name: str) -> None:
    model = torchvision.get_model(name, weights=None, num_classes=7)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    source = sources.load(f"torchvision:{name}@{tmp_path}/a.pth", 7)
    assert isinstance(source.model, LogitsOnly) and source.mean is None and source.num_classes == 7
    check(source, model, 64)


def test_torchvision_without_a_network(torchvision: Any) -> None:
    with pytest.raises(
        ValueError, match=r"download https://\S+/resnet18-\w+.pth on another machine, copy it to \S+ and"
    ):
        sources.load("torchvision:resnet18@IMAGENET1K_V1")
    with pytest.raises(ValueError, match=r"no classifier 'fasterrcnn_resnet50_fpn'"):
        sources.load("torchvision:fasterrcnn_resnet50_fpn@COCO_V1")
    assert not list(Path(torch.hub.get_dir()).rglob("*.pth"))


class Trap:
    """Creates a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_code_in_timms_cache_is_not_run(hub_cache: Path, tmp_path: Path) -> None:
    cached_by_timm(hub_cache, "test_resnet.r160_in1k")
    (file,) = hub_cache.rglob("model.safetensors")
    torch.save({"x": Trap(tmp_path / "trap")}, file.with_name("pytorch_model.bin"))
    file.unlink()
    with pytest.raises(ValueError, match="are refused or damaged: weights_only=True"):
        sources.load("timm:test_resnet.r160_in1k")
    assert not (tmp_path / "trap").exists()


def test_code_in_a_folder_of_transformers_is_not_run(transformers: Any, tmp_path: Path) -> None:
    saved_resnet(transformers, tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").unlink()
    torch.save({"x": Trap(tmp_path / "trap")}, tmp_path / "a" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="are refused or damaged: Weights only load failed"):
        sources.load(f"hf:{tmp_path}/a")
    assert not (tmp_path / "trap").exists()


def test_code_in_torchs_cache_is_not_run(torchvision: Any, tmp_path: Path) -> None:
    cached_by_torchvision(torchvision, "squeezenet1_1")
    (file,) = Path(torch.hub.get_dir()).rglob("*.pth")
    torch.save({"x": Trap(tmp_path / "trap")}, file)
    with pytest.raises(ValueError, match="are refused or damaged: Weights only load failed"):
        sources.load("torchvision:squeezenet1_1@IMAGENET1K_V1")
    assert not (tmp_path / "trap").exists()


# --- transformers ----------------------------------------------------------------------------------------------------


@pytest.fixture
def transformers(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    # It takes this repository's folder of that name, which pytest puts on the path, for a package of its own.
    monkeypatch.setitem(sys.modules, "kernels", None)
    return pytest.importorskip("transformers")


def saved_resnet(transformers: Any, folder: Path, **settings: Any) -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **settings
    )
    model = transformers.ResNetForImageClassification(config)
    model.save_pretrained(folder)
    return model  # type: ignore[no-any-return]


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


@pytest.mark.parametrize("layer", ["", "#resnet.encoder.stages.1", "#resnet.embedder"])
def test_transformers_with_a_folder(transformers: Any, tmp_path: Path, layer: str) -> None:
    names = dict(enumerate("abcde"))
    model = saved_resnet(transformers, tmp_path, id2label=names, label2id={name: i for i, name in names.items()})
    mean, std = [0.4, 0.5, 0.6], [0.1, 0.2, 0.3]
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 48}, image_mean=mean, image_std=std)
    processor.save_pretrained(tmp_path)
    source = sources.load(f"hf:{tmp_path}{layer}", 5)
    assert type(source.model) is (Split if layer else LogitsOnly)
    assert source.size == (32, 48) and source.classes == tuple("abcde")
    check(source, Logits(model), 32)
    # Mean and std do what the image processor does.
    levels = torch.randint(0, 256, (3, 32, 48), dtype=torch.uint8)
    expected = processor(levels, return_tensors="pt")["pixel_values"][0]
    assert source.mean is not None and source.std is not None
    affine = [torch.tensor(values).view(3, 1, 1) for values in (source.mean, source.std)]
    ours = (levels / 255 - affine[0]) / affine[1]
    assert (ours - expected).norm() <= 1e-5 * expected.norm()


def test_transformers_without_names_processor_or_network(transformers: Any, tmp_path: Path) -> None:
    model = saved_resnet(transformers, tmp_path / "a", num_labels=4)
    source = sources.load(f"hf:{tmp_path}/a", 4)
    assert (source.classes, source.mean, source.std, source.size) == (None, None, None, None)
    check(source, Logits(model), 32)
    with pytest.raises(
        ValueError, match=r"of huggingface.co/microsoft/resnet-18 on another machine, .* give hf:FOLDER$"
    ):
        sources.load("hf:microsoft/resnet-18")
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match=rf"^hf:{tmp_path}/b (is no image classifier|cannot be read)"):
        sources.load(f"hf:{tmp_path}/b")
