"""`--init`: runs that start from the weights of a source, and what of it they keep."""

from __future__ import annotations

import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from camkd_fast import models
from camkd_fast.data import LabelledImages
from camkd_fast.experiments import run_report
from camkd_fast.models import sources
from camkd_fast.models.model_file import read_model
from camkd_fast.models.rep_distiller import parameter_names
from camkd_fast.models.split import LogitsOnly
from camkd_fast.train import run
from camkd_fast.train.config import DataConfig, DistillConfig, LogConfig, OptimConfig, TeachConfig
from camkd_fast.train.initial_weights import ImageSizeError, first_model, initialise
from camkd_fast.train.journal import METRICS, read_metrics
from camkd_fast.train.source_strings import SourceString
from tests.support.models import with_random_norms
from tests.support.training import ONE

pytestmark = pytest.mark.usefixtures("one_thread")


def checkpoint(path: Path, name: str = "resnet8", classes: int = 10, channels: int = 1) -> SourceString:
    """A file of RepDistiller, as a source."""
    torch.manual_seed(5)
    model = with_random_norms(models.create(name, classes, channels))
    torch.save({"model": {key: model.state_dict()[ours] for key, ours in parameter_names(name).items()}}, path)
    return SourceString(f"{name}@{path}")


def same(one: nn.Module, other: dict[str, Tensor], *besides: str) -> bool:
    return all(torch.equal(t, other[key]) for key, t in one.state_dict().items() if key not in besides)


def test_all_weights_of_the_same_architecture(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "a.pth")
    model = models.create("resnet8", 10, 1)
    torch.manual_seed(3)
    drawn = torch.rand(2)
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record = initialise(model, "resnet8", source, 10)
    assert torch.equal(torch.rand(2), drawn) and model.training
    assert same(model, sources.load(source).model.state_dict())
    assert (record["source"], record["classifier"], len(record["sha256"])) == (source, "taken", 64)
    assert record == initialise(models.create("resnet8", 10, 1), "resnet8", source, 10)


def test_a_classifier_of_other_classes_is_drawn_anew(tmp_path: Path) -> None:
    source, model = checkpoint(tmp_path / "a.pth", classes=7), models.create("resnet8", 10, 1)
    weight, bias = model.fc.weight.detach().clone(), model.fc.bias.detach().clone()
    with pytest.warns(UserWarning, match=r"a.pth has 7 classes, but the images have 10: fc.weight, fc.bias are drawn"):
        assert initialise(model, "resnet8", source, 10)["classifier"] == "drawn"
    assert torch.equal(model.fc.weight, weight) and torch.equal(model.fc.bias, bias)
    loaded = sources.load(source).model.state_dict()
    assert same(model, loaded, "fc.weight", "fc.bias")


@pytest.mark.parametrize(
    ("name", "channels", "words"),
    [
        (
            "resnet14",
            1,
            r"a.pth does not fit resnet8: it lacks body\.2\..*; resnet8 has no body\.4\.\S+, .* and \d+ more$",
        ),
        ("vgg8", 1, r"does not fit resnet8: it lacks body\..* and \d+ more; resnet8 has no body\..* and \d+ more$"),
        ("resnet8x4", 1, r"does not fit resnet8: resnet8 has no body.1.shortcut.0.weight, .*_tracked$"),
        ("resnet8", 3, r"does not fit resnet8: body.0.0.weight has shape \(16, 3, 3, 3\), but .* \(16, 1, 3, 3\)$"),
    ],
)
def test_other_weights_are_refused_with_both_sides(tmp_path: Path, name: str, channels: int, words: str) -> None:
    source = checkpoint(tmp_path / "a.pth", name, channels=channels)
    with pytest.raises(ValueError, match=words):
        initialise(models.create("resnet8", 10, 1), "resnet8", source, 10)


def test_a_split_source_is_refused(tmp_path: Path) -> None:
    source = SourceString(f"{checkpoint(tmp_path / 'a.pth')}#body.2?size=8")
    with pytest.raises(ValueError, match=r"#body.2\?size=8 are those of a whole model: leave out the #MODULE"):
        initialise(models.create("resnet8", 10, 1), "resnet8", source, 10)


class Tokens(nn.Module):
    """A timm model with features (N, L, D), which gets a wrapper as a student and as a source."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_features, self.num_classes, self.num_prefix_tokens = 4, num_classes, 0
        self.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3, "classifier": "head"}
        self.patches, self.head = nn.Conv2d(3, 4, 4, 4), nn.Linear(4, num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes, self.head = num_classes, nn.Linear(4, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.patches(x).flatten(2).transpose(1, 2)

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(x.mean(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def test_a_timm_student_from_timms_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = SimpleNamespace(
        is_model=lambda name: name.startswith("net"),
        create_model=lambda name, num_classes=1000, **_: Tokens(num_classes),
        list_models=lambda: ["net"],
    )
    monkeypatch.setitem(sys.modules, "timm", stand_in)
    torch.save(Tokens(6).state_dict(), tmp_path / "a.pth")
    student = models.create("timm:net", 2)
    assert type(student).__name__ == "PatchTokens"
    with pytest.warns(
        UserWarning, match=r"has 6 classes, but the images have 2: head.weight, head.bias are drawn anew"
    ):
        initialise(student, "timm:net", SourceString(f"timm:net@{tmp_path}/a.pth"), 2)
    assert torch.equal(student.model.patches.weight, torch.load(tmp_path / "a.pth")["patches.weight"])


# --- runs ------------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "data": DataConfig(images=40, validation=0.1),
    "optim": OptimConfig(epochs=2, batch_size=20, learning_rate=1e-3, schedule="constant"),
    "log": LogConfig(tensorboard=False, progress=False),
}


def test_a_run_starts_from_them_resumes_without_them_and_says_so(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    source = checkpoint(tmp_path / "a.pth")
    config = TeachConfig("resnet8", init=source, out=tmp_path / "run", **SMALL)
    run.teach(config)
    trained = (tmp_path / "run" / "model.safetensors").read_bytes()
    (record,) = read_metrics(tmp_path / "run" / METRICS, "init")
    assert record["source"] == source and record["classifier"] == "taken"
    lead = run_report._lead(tmp_path / "run", config, read_metrics(tmp_path / "run" / METRICS))
    assert lead.endswith(f"2 of 2 epochs, seed 0. Initial weights: {source} (sha256 {record['sha256'][:12]}).")
    random = run.teach(replace(config, init=None, out=tmp_path / "other"))
    assert (random.out / "model.safetensors").read_bytes() != trained
    # Close to where it started: the rate is small.
    start = sources.load(source).model.state_dict()["fc.weight"]
    end = read_model(tmp_path / "run" / "model.safetensors")[0]["fc.weight"]
    assert (end - start).norm() < 0.1 * start.norm()

    shutil.rmtree(sorted((tmp_path / "run" / "checkpoints").iterdir())[-1])
    (tmp_path / "run" / "model.safetensors").unlink()
    (tmp_path / "a.pth").unlink()
    run.teach(config, resume=True)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == trained
    assert read_metrics(tmp_path / "run" / METRICS, "init") == [record]
    with pytest.raises(FileNotFoundError):
        run.teach(replace(config, out=tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_a_student_starts_from_a_run(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    run.teach(TeachConfig("resnet8", out=tmp_path / "t", **SMALL))
    common: dict[str, Any] = {**SMALL, "teachers": (tmp_path / "t",), "strategy": "aver", "seed": 3}
    run.distill(DistillConfig("resnet8", init=SourceString(tmp_path / "t"), out=tmp_path / "s", **common))
    (record,) = read_metrics(tmp_path / "s" / METRICS, "init")
    assert record["source"] == str(tmp_path / "t")


class OfOneSize(nn.Module):
    """Takes images of 16x16 pixels only, and fails as other libraries' models do."""

    def __init__(self, error: Exception, size: int | None) -> None:
        super().__init__()
        self.fc, self.error = nn.Linear(1, 10), error
        self.pretrained_cfg = {} if size is None else {"input_size": (3, size, size)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != 16:
            raise self.error
        return self.fc(torch.rand_like(x).mean((2, 3)))


@pytest.mark.parametrize(
    ("data", "size", "advice"),
    [
        (
            "digits",
            16,
            r" \(its own size is 16x16\) .* 8x8 pixels \(.*\): digits take no --size: choose a model for small",
        ),
        ("fashion-mnist", 16, r" \(its own size is 16x16\) .* 8x8 pixels \(.*\): use --size 16, or another model"),
        ("folder", None, r"net cannot take images of 8x8 pixels \(.*\): use another --size, or a model that shrinks"),
    ],
)
@pytest.mark.parametrize(
    "error",
    [AssertionError("Input height (8) doesn't match model (16)."), AssertionError(), RuntimeError("Output size\nis"),
     AttributeError("none")],
)  # fmt: skip
def test_a_model_that_cannot_take_the_images_says_what_to_do(
    data: str, size: int | None, advice: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "create", lambda *_: OfOneSize(error, size))
    config = TeachConfig("net", data=DataConfig(data))
    small, fitting = (LabelledImages(torch.zeros(4, 1, n, n, dtype=torch.uint8), torch.arange(4), 10, (1.0,), (1.0,))
                      for n in (8, 16))  # fmt: skip
    with pytest.raises(ImageSizeError, match=advice):
        first_model(config, "net", small, False, ONE)
    model, _ = first_model(config, "net", fitting, False, ONE)
    after = torch.random.get_rng_state()
    torch.manual_seed(config.seed)
    OfOneSize(error, size)
    assert model.training and torch.equal(after, torch.random.get_rng_state())  # the check draws no random numbers


def test_a_student_without_a_map_serves_strategies_of_logits_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "create", lambda *_: LogitsOnly(nn.Flatten(), "its features are a list"))
    images = LabelledImages(torch.zeros(4, 1, 2, 5, dtype=torch.uint8), torch.arange(4), 10, (1.0,), (1.0,))
    config = DistillConfig("net", strategy="aver")
    first_model(config, "net", images, False, ONE)
    with pytest.raises(
        ValueError, match=r"fitnet-mkd needs feature maps, but student net has none: its features are a"
    ):
        first_model(replace(config, strategy="fitnet-mkd"), "net", images, False, ONE)
