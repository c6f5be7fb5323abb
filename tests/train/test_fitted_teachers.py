"""Teachers that were trained on other images than the student's: other statistics, size, channels and classes.

Inside a run they give the answers of their own pipeline.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from camkd_fast import models
from camkd_fast.data import LabelledImages, LoaderConfig
from camkd_fast.data.augment import Augmentation
from camkd_fast.models.model_file import model_bytes
from camkd_fast.models.rep_distiller import parameter_names
from camkd_fast.train.config import DataConfig, DistillConfig, LogConfig
from camkd_fast.train.teachers.cache import CacheError
from camkd_fast.train.teachers.runs import load_teachers
from tests.support.models import with_random_norms
from tests.support.training import ONE
from tests.train.test_class_names import batch

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("ant", "bee", "cat", "dog")
OURS = ("dog", "ant", "bee")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def data(names: Sequence[str] | None = OURS, channels: int = 3, side: int = 12, N: int = 6) -> LabelledImages:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (N, channels, side, side), generator=generator, dtype=torch.uint8)
    levels = (120.0, 110.0, 100.0)[:channels], (60.0, 65.0, 70.0)[:channels]
    return LabelledImages(pixels, torch.arange(N) % 3, 3, *levels, None if names is None else tuple(names))


def run_folder(path: Path, **metadata: Any) -> nn.Module:
    """A run of ImageNet's statistics at 8x8 pixels."""
    torch.manual_seed(1)
    model = with_random_norms(models.create("resnet8", 4)).eval()
    known = {"model": "resnet8", "num_classes": 4, "in_channels": 3, "size": [8, 8], "class_names": list(NAMES)}
    known |= {"mean": [255 * m for m in MEAN], "std": [255 * s for s in STD]}
    path.mkdir()
    (path / "model.safetensors").write_bytes(model_bytes(model, {**known, **metadata}))
    return model


def loaded(images: LabelledImages, *teachers: object, **changes: Any) -> Any:
    changes = {"strategy": "ca-mkd", "data": DataConfig(views=1), "log": LogConfig(progress=False), **changes}
    settings = LoaderConfig(4, augmentation=Augmentation(padding=0, flip=False), views=1)
    return load_teachers(DistillConfig(teachers=tuple(map(str, teachers)), **changes), images, settings, ONE)


@torch.no_grad()
def own_pipeline(model: nn.Module, pixels: Tensor, side: int | None) -> Tensor:
    """Logits of the model as its makers run it: Pillow's resize, its statistics, its classes."""
    from PIL import Image

    if side is not None:
        resized = [
            Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.BILINEAR)
            for image in pixels
        ]
        flat = torch.stack([torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in resized])
        pixels = flat.view(len(pixels), side, side, 3).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return model((pixels.float() / 255 - mean) / std)


@pytest.mark.parametrize("side", [8, 12, 20])
def test_a_teacher_answers_as_in_its_own_pipeline(tmp_path: Path, side: int) -> None:
    """Another mean, std, size and class order. To one level's rounding, which Pillow does and this does not."""
    images = data()
    model = run_folder(tmp_path / "t", size=[side, side])
    (prediction,) = loaded(images, tmp_path / "t")(batch(images))
    expected = own_pipeline(model, images.pixels, None if side == 12 else side)
    if side == 12:
        level = torch.zeros(1)  # equal to rounding of float32
    else:
        # How far the logits move if every pixel does by half a level, at random.
        noise = (torch.rand(images.pixels.shape[0], 3, side, side) - 0.5) / 255 / torch.tensor(STD).view(1, 3, 1, 1)
        there = torch.randn(len(images), 3, side, side)
        with torch.no_grad():
            level = (model(there + noise) - model(there)).norm()
    order = [NAMES.index(name) for name in OURS]
    difference = (prediction.logits - expected[:, order]).norm()
    assert difference <= 2 * level + 1e-5 * expected.norm()


def test_wrong_preprocessing_would_be_seen(tmp_path: Path) -> None:
    """The bound of the test above is far below what the student's own statistics give."""
    images = data()
    model = run_folder(tmp_path / "t", size=[8, 8])
    expected = own_pipeline(model, images.pixels, 8)
    with torch.no_grad():
        wrong = model(images.normalise(images.pixels))
    assert (wrong - expected).norm() > 0.05 * expected.norm()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_half_precision(tmp_path: Path, dtype: Any) -> None:
    from camkd_fast.train.config import PrecisionConfig

    images = data()
    run_folder(tmp_path / "t")
    (exact,), (half,) = (
        loaded(images, tmp_path / "t", precision=PrecisionConfig(dtype=name, compile="off"))(batch(images))
        for name in ("float32", dtype)
    )
    assert half.logits.dtype == getattr(torch, dtype)
    assert (half.logits.float() - exact.logits).norm() < 0.05 * exact.logits.norm()


def test_gray_images_for_a_colour_teacher(tmp_path: Path) -> None:
    gray = data(channels=1)
    model = run_folder(tmp_path / "t", size=[12, 12])
    (prediction,) = loaded(gray, tmp_path / "t")(batch(gray))
    expected = own_pipeline(model, gray.pixels.expand(-1, 3, -1, -1), None)[:, [3, 0, 1]]
    assert (prediction.logits - expected).norm() <= 1e-5 * expected.norm()
    torch.manual_seed(0)
    (tmp_path / "g").mkdir()
    metadata = {
        "model": "resnet8",
        "num_classes": 3,
        "in_channels": 1,
        "mean": [100.0],
        "std": [50.0],
        "size": [12, 12],
    }
    (tmp_path / "g" / "model.safetensors").write_bytes(model_bytes(models.create("resnet8", 3, 1), metadata))
    with pytest.raises(
        ValueError, match=r"g cannot take the student's images of shape \(3, 12, 12\): it takes images of 1 channels, "
    ):
        loaded(data(), tmp_path / "g")


# --- what a source does not know -------------------------------------------------------------------------------------


def foreign(path: Path, name: str = "resnet8", classes: int = 3) -> str:
    """The string of a checkpoint of RepDistiller, which has weights only."""
    torch.manual_seed(2)
    state = with_random_norms(models.create(name, classes)).state_dict()
    torch.save({"model": {key: state[ours] for key, ours in parameter_names(name).items()}, "best_acc": 0.5}, path)
    return f"{name}@{path}"


def test_unknown_statistics_are_the_students_which_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = data()
    run_folder(tmp_path / "t")
    plain, other = foreign(tmp_path / "a.pth"), foreign(tmp_path / "b.pth")
    said = f"{plain}?mean={','.join(map(str, MEAN))}&std={','.join(map(str, STD))}"
    with pytest.warns(
        UserWarning, match=r"no class names are known of .*a.pth, .*b.pth, .*: class 0 to 2 are taken"
    ) as caught:
        live = loaded(images, plain, tmp_path / "t", other, said)
    assert len(caught) == 1
    (line,) = (record.getMessage() for record in caplog.records if "mean and std" in record.getMessage())
    assert line.startswith(f"no mean and std are known of {plain}, {other}: images are normalised as the student's")
    first, _, second, third = live(batch(images))
    assert torch.equal(first.logits, second.logits) and not torch.allclose(first.logits, third.logits)


def test_a_class_map_relates_what_names_cannot(tmp_path: Path) -> None:
    images = data(("x", "y", "z"))
    model = run_folder(tmp_path / "t", size=[12, 12])
    with pytest.raises(
        ValueError, match=r"t knows 4 classes, such as 'ant' and 'bee', but the images have 3, such as 'x'"
    ):
        loaded(images, tmp_path / "t")
    file = tmp_path / "map.yaml"
    file.write_text("x: dog\ny: 1\nz: ant\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (prediction,) = loaded(images, tmp_path / "t", class_map=file)(batch(images))
        loaded(data(None), tmp_path / "t", class_map=_write(tmp_path / "n.json", '{"0": 3, "1": 1, "2": 0}'))
    expected = own_pipeline(model, images.pixels, None)[:, [3, 1, 0]]
    assert (prediction.logits - expected).norm() <= 1e-5 * expected.norm()
    file.write_text("x: dog\ny: 1\nz: gnu\n")
    with pytest.raises(ValueError, match=r"map.yaml: no class of teacher .*t is called 'gnu'; there are 4$"):
        loaded(images, tmp_path / "t", class_map=file)


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_wordnet_ids_and_descriptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from camkd_fast.models import imagenet_names

    images = data(("n02105855", "n01440764", "n01443537"))
    model = run_folder(tmp_path / "t", class_names=["tench", "goldfish", "crane", "Shetland sheepdog"], size=[12, 12])
    monkeypatch.setattr(imagenet_names, "wordnet_ids", lambda names: ["n01440764", "n01443537", "crane", "n02105855"])
    (prediction,) = loaded(images, tmp_path / "t")(batch(images))
    expected = own_pipeline(model, images.pixels, None)[:, [3, 0, 1]]
    assert (prediction.logits - expected).norm() <= 1e-5 * expected.norm()
    monkeypatch.setattr(imagenet_names, "wordnet_ids", lambda names: None)
    with pytest.raises(
        ValueError,
        match=r"knows its 4 classes by description, such as 'tench' and 'goldfish', but those of the 3 classes of the "
        r"images are WordNet ids, such as 'n02105855' and 'n01440764': install timm, .*\[teachers\].*--class-map FILE",
    ):
        loaded(images, tmp_path / "t")


# --- what cannot be fitted -------------------------------------------------------------------------------------------

MODULE = """
from torch import nn

class Flat(nn.Module):
    def __init__(self, side):
        super().__init__()
        self.fc = nn.Linear(3 * side * side, 3)

    def forward(self, x):
        return self.fc(x.flatten(1))

def rigid():
    return Flat(8)

def sized():
    model = Flat(8)
    model.size = 8
    return model

class Tokens(nn.Module):
    def forward(self, x):
        return x.flatten(2)
"""


def test_a_model_of_another_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rigid_models.py").write_text(MODULE)
    with pytest.raises(
        ValueError,
        match=r"^teacher py:rigid_models:rigid cannot take the student's images of shape \(3, 12, 12\): .*mat1 and ",
    ):
        loaded(data(), "py:rigid_models:rigid", strategy="aver")
    with pytest.warns(UserWarning, match="no class names"):
        live = loaded(data(), "py:rigid_models:sized", strategy="aver")  # is resized to its own
    assert live.num_features == [0] and live(batch(data()))[0].logits.shape == (6, 3)
    with pytest.raises(ValueError, match=r"Tokens cannot take .*: its logits have shape \(1, 3, 144\), not \(N, C\)$"):
        loaded(data(), "py:rigid_models:Tokens", strategy="aver")


@pytest.mark.parametrize("strategy", ["ca-mkd", "fitnet-mkd"])
def test_feature_strategies_need_a_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rigid_models.py").write_text(MODULE)
    with pytest.raises(
        ValueError,
        match=rf"^{strategy} needs feature maps, but teacher py:rigid_models:sized has none: no module of "
        r"py:rigid_models:sized is named for it, as in py:rigid_models:sized#MODULE; .*: kd, aver, ebkd, aekd, ca",
    ):
        loaded(data(), "py:rigid_models:sized", strategy=strategy)


# --- cache -----------------------------------------------------------------------------------------------------------


def test_a_cache_knows_the_preprocessing_and_the_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    images = data()
    run_folder(tmp_path / "t")
    live = loaded(images, tmp_path / "t")(batch(images))[0]
    for _ in range(2):
        replayed = loaded(images, tmp_path / "t", teacher_cache=tmp_path / "cache")(batch(images))[0]
        assert (replayed.logits - live.logits).norm() <= 1e-5 * live.logits.norm()
    for other in (f"{tmp_path}/t?size=9", f"{tmp_path}/t?mean=0.5&std=0.5"):
        with pytest.raises(CacheError, match="teacher 0 has other weights or layers"):
            loaded(images, other, teacher_cache=tmp_path / "cache")
    file = _write(tmp_path / "m.yaml", "dog: ant\nant: bee\nbee: cat\n")
    with pytest.raises(CacheError, match="teacher 0 has other weights or layers"):
        loaded(images, tmp_path / "t", class_map=file, teacher_cache=tmp_path / "cache")


def test_a_cache_of_a_teacher_without_a_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rigid_models.py").write_text(MODULE)
    for _ in range(2):
        with pytest.warns(UserWarning, match="no class names"):
            cached = loaded(data(), "py:rigid_models:sized", strategy="aver", teacher_cache=tmp_path / "cache")
    assert cached(batch(data()))[0].logits.shape == (6, 3)
