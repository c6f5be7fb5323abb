"""Teachers of timm and torchvision themselves inside `distill`, where they are installed. Nothing is downloaded.

Weights are random and come from files, or from the libraries' caches under the published names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from camkd_fast import cli, models
from camkd_fast.data import LabelledImages
from camkd_fast.models import sources
from camkd_fast.models.imagenet_names import wordnet_ids
from camkd_fast.models.protocol import Source
from camkd_fast.train.teachers.fitted import fitted
from tests.models import test_installed_sources as installed
from tests.repo.test_documented_commands import photos

pytestmark = pytest.mark.usefixtures("one_thread")
hub_cache, torchvision = installed.hub_cache, installed.torchvision  # fixtures
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET = "?mean=0.485,0.456,0.406&std=0.229,0.224,0.225&size="


def images(side: int, classes: int, names: tuple[str, ...] | None = None) -> LabelledImages:
    """Of a student whose statistics are not ImageNet's."""
    pixels = torch.randint(256, (2, 3, side, side), dtype=torch.uint8)
    return LabelledImages(pixels, torch.zeros(2).long(), classes, (129.0, 124.0, 112.0), (68.0, 65.0, 70.0), names)


@torch.no_grad()
def check(name: str, source: Source, model: nn.Module, data: LabelledImages, order: Any = slice(None)) -> None:
    """The teacher has the logits that the model has for its own normalisation of the same pixels."""
    assert source.mean is not None and source.std is not None
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (source.mean, source.std))
    expected: Tensor = model.eval()((data.pixels / 255 - mean) / std)[:, order]
    teacher = fitted(name, models.freeze(source.model), source, data).model
    found = teacher(data.normalise(data.pixels))
    assert found.shape == expected.shape and (found - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "convnext_atto", "efficientnet_b0", "resnet18", "mobilenetv3_small_050"]
)
def test_files_of_timm(hub_cache: Path, tmp_path: Path, name: str) -> None:
    from safetensors.torch import save_file

    model = pytest.importorskip("timm").create_model(name, pretrained=False, num_classes=5)
    save_file({key: t.contiguous() for key, t in model.state_dict().items()}, tmp_path / "a.safetensors")
    source = sources.load(f"timm:{name}@{tmp_path}/a.safetensors", 5)
    config = model.pretrained_cfg
    assert (source.mean, source.std, source.size) == (config["mean"], config["std"], (224, 224))
    check(name, source, model, images(224, 5))


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("resnet18", "layer4"),
        ("convnext_tiny", "features"),
        ("efficientnet_b0", "features"),
        ("mobilenet_v3_small", "features"),
        ("regnet_y_400mf", "trunk_output"),
    ],
)
def test_files_of_torchvision(torchvision: Any, tmp_path: Path, name: str, layer: str) -> None:
    model = torchvision.get_model(name, weights=None, num_classes=5)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    source = sources.load(f"torchvision:{name}@{tmp_path}/a.pth#{layer}{IMAGENET}96", 5)
    assert (source.mean, source.std) == (MEAN, STD) and source.model.num_features > 0
    check(name, source, model, images(96, 5))


def test_some_classes_of_imagenet(hub_cache: Path, torchvision: Any) -> None:
    """WordNet ids of timm and descriptions of torchvision against the folders of an ImageNet subset."""
    folders = ("n09835506", "n01440764", "n02012849")  # ballplayer, tench, crane (the bird)
    places = [981, 0, 134]
    model = installed.cached_by_timm(hub_cache, "test_resnet.r160_in1k")
    data = images(160, 3, folders)
    check("a", sources.load("timm:test_resnet.r160_in1k", 3), model, data, places)
    model = installed.cached_by_torchvision(torchvision, "squeezenet1_1")
    check("b", sources.load("torchvision:squeezenet1_1@IMAGENET1K_V1", 3), model, images(224, 3, folders), places)


def test_wordnet_ids_of_descriptions(torchvision: Any) -> None:
    info = pytest.importorskip("timm.data").ImageNetInfo("imagenet-1k")
    ids = info.label_names()
    words = torchvision.ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    assert wordnet_ids(words) == ids
    lemmas = [info.label_name_to_description(name, detailed=False) for name in ids]
    assert wordnet_ids(lemmas) == ids
    found = wordnet_ids([*words[::-1], "no class"])  # in no known order
    assert found is not None and found[-1] == "no class"
    pairs = list(zip(found[:-1], words[::-1], ids[::-1], strict=True))
    assert all(name in (text, known) for name, text, known in pairs)
    assert sum(name == known for name, _, known in pairs) > 980


@pytest.mark.filterwarnings("ignore:no class names are known")
def test_a_run_with_three_of_them(
    hub_cache: Path, torchvision: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timm = pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos", ("cat", "dog"), side=24)
    for name in ("test_convnext", "test_efficientnet"):
        torch.save(timm.create_model(name, pretrained=False, num_classes=2).state_dict(), f"{name}.pth")
    torch.save(torchvision.get_model("resnet18", weights=None, num_classes=2).state_dict(), "resnet18.pth")
    teachers = [
        *("timm:test_convnext@test_convnext.pth", "timm:test_efficientnet@test_efficientnet.pth"),
        f"torchvision:resnet18@resnet18.pth#layer4{IMAGENET}64",
    ]
    line = "distill --student resnet8 --strategy ca-mkd --data folder --root photos --size 24 --epochs 2 --batch-size 4"
    more = "--no-progress --no-tensorboard --loader torch --workers 0 --out run --teachers"
    assert cli.main([*line.split(), *more.split(), *teachers]) == 0
    assert (tmp_path / "run" / "model.safetensors").exists() and (tmp_path / "run" / "report.html").exists()
    words = "--data folder --root photos --size 24 --split test --workers 0"
    assert cli.main(["teachers", *teachers, *words.split()]) == 0
