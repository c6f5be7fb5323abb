"""Checkpoints of RepDistiller and CA-MKD: every official name has its place in the zoo's model, and logits are equal.

`official_keys.txt` lists the names and shapes in the official models. The models themselves are not part of this
repository: set CAMKD_FAST_OFFICIAL to a checkout of either one, and the slow tests build them and compare results.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from camkd_fast import models
from camkd_fast.models import checkpoint_files, rep_distiller
from camkd_fast.models.protocol import feature_model, predict
from camkd_fast.models.weights import fill
from tests.support.models import with_random_norms

KEYS = Path(__file__).with_name("official_keys.txt")
OFFICIAL = os.environ.get("CAMKD_FAST_OFFICIAL")  # folder that holds models/ of RepDistiller or CA-MKD

pytestmark = pytest.mark.usefixtures("one_thread")


def official_shapes() -> dict[str, dict[str, tuple[int, ...]]]:
    """Model -> name -> shape, from `official_keys.txt`."""
    _, *sections = KEYS.read_text().split("\n[")
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for section in sections:
        model, lines = section.split("]\n")
        shapes = found.setdefault(model, {})
        for line in lines.strip().splitlines():
            module, tensors = line.split(": ")
            for tensor in tensors.split(", "):
                name, shape = tensor.split()
                shapes[f"{module}.{name}"] = tuple(int(n) for n in shape.split("x")) if shape != "scalar" else ()
    return found


SHAPES = official_shapes()


def official_state(name: str) -> dict[str, Tensor]:
    """A state dict under the official names, with distinct random values."""
    kept = {"num_batches_tracked": lambda _: torch.tensor(7), "running_var": lambda shape: torch.rand(shape) + 0.5}
    return {key: kept.get(key.rpartition(".")[2], torch.randn)(shape) for key, shape in SHAPES[name].items()}


def test_the_list_covers_the_zoo() -> None:
    assert sorted(filter(None, map(models.zoo_name, SHAPES))) == sorted(models.names())


@pytest.mark.parametrize("name", SHAPES)
def test_every_official_name_has_one_place_of_equal_shape(name: str) -> None:
    names = rep_distiller.parameter_names(name)
    ours = {key: tuple(tensor.shape) for key, tensor in models.create(name, 100).state_dict().items()}
    assert set(names) == set(SHAPES[name])
    assert len(set(names.values())) == len(names) and set(names.values()) == set(ours)
    assert {key: ours[names[key]] for key in names} == SHAPES[name]


@pytest.mark.parametrize("name", SHAPES)
def test_both_sides_define_the_modules_in_one_order(name: str) -> None:
    """The units of a stage have equal shapes: two of them exchanged would show only here."""
    names = rep_distiller.parameter_names(name)
    assert list(names) == list(SHAPES[name])
    assert list(names.values()) == list(models.create(name, 100).state_dict())


ONE_PER_FAMILY = ("resnet8", "wrn_16_2", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2")


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_every_tensor_arrives(name: str) -> None:
    state = official_state(name)
    model = rep_distiller.load(name, state, "file")
    assert not model.training and model.num_classes == 100 and type(model) is type(models.create(name, 2))
    ours = model.state_dict()
    for official, key in rep_distiller.parameter_names(name).items():
        assert torch.equal(ours[key], state[official]) and ours[key].data_ptr() != state[official].data_ptr()


def test_our_own_names_and_other_dtypes_are_read() -> None:
    model = with_random_norms(models.create("resnet8", 6, 1))
    loaded = rep_distiller.load("resnet8", {key: t.double() for key, t in model.state_dict().items()}, "file")
    assert {t.dtype for t in loaded.parameters()} == {torch.float32}
    assert all(torch.equal(t, model.state_dict()[key]) for key, t in loaded.state_dict().items())


def test_classes_and_channels_are_the_checkpoints() -> None:
    state = official_state("wrn_16_2")
    state["fc.weight"], state["fc.bias"] = torch.randn(7, 128), torch.randn(7)
    state["conv1.weight"] = torch.randn(16, 1, 3, 3)
    model = rep_distiller.load("wrn-16-2", state, "file")
    assert model.num_classes == 7 and model(torch.randn(2, 1, 16, 16)).shape == (2, 7)


def test_counters_may_be_missing_but_only_counters() -> None:
    state = {key: t for key, t in official_state("vgg8").items() if "num_batches_tracked" not in key}
    ours = rep_distiller.load("vgg8", state, "file").state_dict()
    names = rep_distiller.parameter_names("vgg8")
    assert all(torch.equal(ours[names[key]], t) for key, t in state.items())
    for key in state:
        with pytest.raises(ValueError, match=f"^file does not fit vgg8: it lacks {key}$"):
            rep_distiller.load("vgg8", {other: t for other, t in state.items() if other != key}, "file")


class Versioned(nn.Module):
    """A module that refuses state without its version, as torchvision's MNASNet."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 3)

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
        if metadata.get("version") != 2:
            raise ValueError(f"version should be set to 2 instead of {metadata.get('version')}")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


@pytest.mark.parametrize("model", [Versioned(), nn.Sequential(nn.Identity(), Versioned())], ids=["whole", "inside"])
def test_modules_find_the_version_of_their_state(model: nn.Module) -> None:
    tensors = {name: torch.rand_like(tensor) for name, tensor in model.state_dict().items()}
    fill(model, tensors, "versioned", "file")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


def test_missing_and_extra_names_are_listed_up_to_ten() -> None:
    state = official_state("resnet14")
    with pytest.raises(ValueError, match=r"^file does not fit resnet8: resnet8 has no layer1.1.conv1.weight, ") as info:
        rep_distiller.load("resnet8", state, "file")
    assert str(info.value).endswith("layer1.1.bn2.running_mean and 26 more") and "lacks" not in str(info.value)
    assert str(info.value).count(", ") == 9
    ten = r"(\S+, ){9}\S+ and \d+ more"
    with pytest.raises(ValueError, match=rf"^a.pth does not fit vgg8: it lacks {ten}; vgg8 has no {ten}$"):
        rep_distiller.load("vgg8", state, "a.pth")
    with pytest.raises(ValueError, match=r"^a.pth does not fit resnet14: it lacks fc.bias; resnet14 has no mlp.bias$"):
        rep_distiller.load("resnet14", {key.replace("fc.b", "mlp.b"): t for key, t in state.items()}, "a.pth")


def test_the_missing_names_are_in_the_files_own_spelling() -> None:
    state = models.create("resnet8", 3).state_dict()
    del state["body.0.1.running_var"]
    with pytest.raises(ValueError, match=r"^file does not fit resnet8: it lacks body.0.1.running_var$"):
        rep_distiller.load("resnet8", state, "file")


@pytest.mark.parametrize(
    ("key", "shape", "needed"),
    [
        ("layer3.0.conv2.weight", (64, 64, 1, 1), r"\(64, 64, 3, 3\)"),
        ("fc.weight", (100, 32), r"\(100, 64\)"),
        ("fc.bias", (99,), r"\(100,\)"),
        ("conv1.weight", (16,), r"\(16, 1, 3, 3\)"),
        ("fc.weight", (), r"\(1, 64\)"),
        ("bn1.num_batches_tracked", (1,), r"\(\)"),
    ],
)
def test_other_shapes_are_refused_with_both(key: str, shape: tuple[int, ...], needed: str) -> None:
    state = official_state("resnet8") | {key: torch.zeros(shape)}
    found = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"^file does not fit resnet8: {key} has shape {found}, but .* {needed}$"):
        rep_distiller.load("resnet8", state, "file")


def test_models_of_others_have_no_table() -> None:
    with pytest.raises(ValueError, match="the zoo has no model 'ResNet50'; nearest: resnet"):
        rep_distiller.parameter_names("ResNet50")


# --- against the official code ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def official() -> Iterator[ModuleType]:
    """The package `models` of the checkout."""
    if OFFICIAL is None:
        pytest.skip("CAMKD_FAST_OFFICIAL names no checkout of RepDistiller or CA-MKD")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(OFFICIAL)
        yield importlib.import_module("models")


@pytest.mark.slow
@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_logits_and_maps_equal_the_official_models(
    official: ModuleType, name: str, old_format: bool, tmp_path: Path
) -> None:
    if name not in official.model_dict:
        pytest.skip(f"{OFFICIAL} has no {name}")
    theirs = with_random_norms(official.model_dict[name](num_classes=100))
    assert {key: tuple(t.shape) for key, t in theirs.state_dict().items()} == SHAPES[name]
    optimizer = torch.optim.SGD(theirs.parameters(), 0.05, momentum=0.9)
    state = {
        "epoch": 240,
        "model": theirs.state_dict(),
        "best_acc": torch.tensor(74.6),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=not old_format)
    ours = rep_distiller.load(name, checkpoint_files.read(tmp_path / "a.pth"), "a.pth")
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        theirs.to(dtype).eval(), ours.to(dtype)
        images = torch.randn(4, 3, 32, 32, dtype=dtype)
        maps, logits = theirs(images, is_feat=True)
        got = predict(feature_model(ours), images)
        # Their last item is the pooled map, flattened.
        for mine, expected in ((got.logits, logits), (got.features.mean((2, 3)), maps[-1])):
            assert expected.norm() > 0 and (mine - expected).norm() <= tolerance * expected.norm()
