"""Every command of the pages about teachers runs: on generated data, with local files and stand-ins for downloads."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from types import MethodType, ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from camkd_fast import cli, models
from camkd_fast.data import cifar
from camkd_fast.data.fetch import default_folder
from camkd_fast.experiments import run_report
from camkd_fast.models.model_file import model_bytes
from camkd_fast.models.rep_distiller import parameter_names
from camkd_fast.train.journal import read_metrics
from tests.data.test_cifar import archive, cifar100_files
from tests.models.test_source_packages import Bare, Classifier, Processor
from tests.support.models import with_random_norms

pytestmark = pytest.mark.usefixtures("one_thread")
DOCS = Path(__file__).parents[2] / "docs"
CLASSES = ("n01440764", "n01443537", "n01484850")
WORDS = ("tench", "goldfish", "great white shark")
SHORT = "--epochs 1 --batch-size 6 --images 6 --no-progress --no-tensorboard --loader torch --workers 0"


def commands(page: str) -> list[str]:
    """Lines of the shell blocks of a page."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()]


def run(line: str, *more: str) -> None:
    """Run a command; the data are small, and one epoch does."""
    short = re.sub(r"--epochs \d+", SHORT, line)
    words = [word for word in shlex.split(short) if "digits" not in line or word not in ("--loader", "torch")]
    assert words.pop(0) == "camkd-fast"
    assert cli.main([*words, *more]) == 0, line


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CAMKD_FAST_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(run_report, "write", lambda out, environment: out)  # seconds each, and tested elsewhere
    return tmp_path


def photos(root: Path, names: tuple[str, ...], side: int = 16) -> None:
    """JPEG files in class folders."""
    image = pytest.importorskip("PIL.Image")
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for name in names:
            (root / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = torch.randint(256, (side, side, 3), generator=generator, dtype=torch.uint8)
                image.fromarray(pixels.numpy()).save(root / split / name / f"{i}.jpg")


def checkpoint(path: Path, name: str, classes: int, channels: int = 3) -> None:
    """As RepDistiller writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    model = with_random_norms(models.create(name, classes, channels))
    state = {key: model.state_dict()[ours] for key, ours in parameter_names(name).items()}
    torch.save({"epoch": 240, "model": state, "best_acc": torch.tensor(70.0)}, path)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm, torchvision and transformers with small models of three ImageNet classes and one more."""

    class Net(Classifier):
        def __init__(self, num_classes: int = 4, in_chans: int = 3, **_: Any) -> None:
            super().__init__(num_classes)

    timm: Any = ModuleType("timm")
    timm.is_model = lambda name: name.partition(".")[0] == "resnet18"
    timm.list_models = lambda: ["resnet18"]
    timm.get_pretrained_cfg = lambda name: SimpleNamespace(has_weights=True, hf_hub_id="timm/x", url="")
    timm.create_model = lambda name, pretrained=False, **settings: Net(**settings)
    data: Any = ModuleType("timm.data")
    data.infer_imagenet_subset = lambda model: "small"
    info = SimpleNamespace(
        label_names=lambda: [*CLASSES[::-1], "n09999999"],
        label_name_to_description=lambda name, detailed: dict(zip(CLASSES, WORDS, strict=True)).get(name, "other"),
    )
    data.ImageNetInfo = lambda subset: info
    transforms = SimpleNamespace(crop_size=[20], mean=[0.5, 0.25, 0.5], std=[0.1, 0.2, 0.1])
    weights = SimpleNamespace(
        name="IMAGENET1K_V2", url="x", meta={"categories": ["other", *WORDS]},
        transforms=lambda: transforms, get_state_dict=lambda **_: {},
    )  # fmt: skip
    vision: Any = ModuleType("torchvision.models")
    vision.list_models = lambda module: ["resnet50"]
    vision.get_model_weights = lambda name: SimpleNamespace(__members__={"IMAGENET1K_V2": weights})

    class Vision(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer4, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.layer4(x).mean((2, 3)))

    vision.get_model = lambda name, weights=None, num_classes=4: Vision()
    hub: Any = ModuleType("transformers")
    net: Any = Bare()
    net.config = SimpleNamespace(num_labels=3, id2label=dict(enumerate(("goldfish", *WORDS[::2]))))
    net.config.id2label = {0: "tench", 1: "goldfish, gold fish", 2: "great white shark"}
    forward = type(net).forward
    net.forward = MethodType(lambda self, pixel_values: SimpleNamespace(logits=forward(self, pixel_values)), net)
    for name, found in (("AutoModelForImageClassification", net), ("AutoImageProcessor", Processor())):
        setattr(hub, name, SimpleNamespace(from_pretrained=lambda name, found=found, **_: found))
    parent: Any = ModuleType("torchvision")
    parent.models = vision
    modules = {
        "timm": timm,
        "timm.data": data,
        "torchvision": parent,
        "torchvision.models": vision,
        "transformers": hub,
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.filterwarnings("ignore:no class names are known")
def test_bring_your_own_teachers(here: Path, packages: None, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    photos(here / "imagenet100", CLASSES)
    photos(here / "photos", ("cat", "dog"))
    for k in (0, 2):
        (here / "runs" / f"t{k}").mkdir(parents=True)
        known = {"model": "resnet8", "num_classes": 10, "in_channels": 1, "size": [8, 8], "mean": [4.9], "std": [6.0]}
        file = here / "runs" / f"t{k}" / "model.safetensors"
        file.write_bytes(model_bytes(models.create("resnet8", 10, 1), {**known, "class_names": list("0123456789")}))
    checkpoint(here / "resnet20.pth", "resnet20", 10, 1)
    (here / "my_models.py").write_text(
        "from camkd_fast import models\n\ndef teacher():\n    return models.create('resnet8', 10, 3)\n"
    )
    page = (DOCS / "teachers.md").read_text()
    (text,) = re.findall(r"^```yaml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (here / "classes.yaml").write_text(text)
    install, *lines = commands("teachers.md")
    (extras,) = re.findall(r"^pip install '\.\[(.+)\]'$", install)
    assert set(extras.split(",")) <= set(re.findall(r"^(\w+) = \[", (DOCS.parent / "pyproject.toml").read_text(), re.M))
    assert len(lines) == 8
    for line in lines:
        # Stand-ins are small enough for images of their size; the real default is 224 pixels.
        sized = "--data folder" in line and "--size" not in line
        run(line, *(["--size", "16"] if sized else []))
    assert "timm:resnet18.a1_in1k" in capsys.readouterr().out
    assert sorted(path.suffix for path in (here / "runs/s0/export").iterdir()) == [".onnx", ".pt2"]
    for name in ("s0", "s1", "s2", "t1"):
        assert (here / "runs" / name / "model.safetensors").exists()
    (record,) = read_metrics(here / "runs/t1/metrics.jsonl", "init")
    assert record["source"] == "timm:resnet18.a1_in1k"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:no class names are known")
def test_the_papers_teachers(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive(default_folder("cifar100") / "cifar-100-python.tar.gz", cifar.CIFAR100.folder, cifar100_files())
    for name in ("resnet56", "vgg13", "wrn_40_2"):
        checkpoint(here / "save" / "models" / f"{name}_vanilla" / "ckpt_epoch_240.pth", name, 100)
    change, *lines = commands("paper_teachers.md")
    assert change == "cd save/models" and len(lines) == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here / "save" / "models")
        for line in lines:
            run(line)
    assert "resnet56@ckpt_epoch_240.pth" in capsys.readouterr().out
    assert (here / "save" / "models" / "runs" / "vgg8" / "model.safetensors").exists()
