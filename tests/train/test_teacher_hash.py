"""What the hash of a teacher notices: weights, attributes and code; and what it leaves to packages."""

from __future__ import annotations

import copy
import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from camkd_fast import models
from camkd_fast.models.split import LogitsOnly, split
from camkd_fast.train.teachers.cache import CacheError, TeacherCache
from camkd_fast.train.teachers.live import LiveTeachers
from camkd_fast.train.teachers.teacher_hash import difference, same_teacher, state_hash
from tests.support.cache_parts import build, make_key, make_teachers
from tests.support.training import SmallNet

CODE = """
from dataclasses import dataclass

import torch
from torch import nn

FACTOR = 1.5
UNUSED = 1
DEVICE = "cpu"


@dataclass
class Settings:
    gain: float = 1.0


def scaled(x):
    return x * FACTOR


def unused(x):
    return x


class Base(nn.Module):
    shift = 0.25

    def score(self, x):
        return scaled(x) + self.shift


class Net(Base):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 10)
        self.num_classes = 10
        self.factor = 2.0
        self.sizes = (1, [2, 3])
        self.settings = Settings()
        self.table = {"a": 1.0}
        self.bias = torch.zeros(3)
        self.register_buffer("hidden", torch.ones(2), persistent=False)

    def forward(self, x):
        return [self.score(self.fc(x.flatten(1)).to(DEVICE)) for _ in range(1)][0]


def teacher():
    torch.manual_seed(0)
    return Net()
"""


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Writes a file of code and imports it as `user_teacher`."""
    monkeypatch.syspath_prepend(str(tmp_path))
    count = iter(range(100))

    def write(code: str) -> Any:
        folder = tmp_path / str(next(count))
        folder.mkdir()
        (folder / "user_teacher.py").write_text(code)
        monkeypatch.syspath_prepend(str(folder))
        sys.modules.pop("user_teacher", None)
        importlib.invalidate_caches()
        return importlib.import_module("user_teacher")

    yield write
    sys.modules.pop("user_teacher", None)


EDITS = {
    "method": ("x.flatten(1)", "x.flatten(1).relu()"),
    "method of a base class": ("+ self.shift", "- self.shift"),
    "class attribute": ("shift = 0.25", "shift = 0.5"),
    "function of the file": ("return x * FACTOR", "return x / FACTOR"),
    "number of the file": ("FACTOR = 1.5", "FACTOR = 50.0"),
    "attribute": ("self.factor = 2.0", "self.factor = float('3')"),
    "default of a dataclass": ("gain: float = 1.0", "gain: float = 2.0"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_teacher_has_another_hash(written: Callable[[str], Any], edit: str) -> None:
    first, again = (state_hash(written(CODE).teacher()) for _ in range(2))
    assert first == again and first.endswith(".own")
    other = state_hash(written(CODE.replace(*EDITS[edit])).teacher())
    assert other != first and other.partition(".")[0] == first.partition(".")[0]
    assert difference(first, other) == "has other code or attributes"


def test_code_that_the_teacher_does_not_use_may_change(written: Callable[[str], Any]) -> None:
    first = state_hash(written(CODE).teacher())
    code = (
        CODE.replace("UNUSED = 1", "UNUSED = 2").replace("    return x\n", "    return -x\n").replace('"cpu"', '"cuda"')
    )
    assert code != CODE and state_hash(written(code).teacher()) == first


ATTRIBUTES: dict[str, Callable[[Any], None]] = {
    "number": lambda net: setattr(net, "factor", 3.0),
    "integer": lambda net: setattr(net, "num_classes", 11),
    "bool": lambda net: setattr(net, "inverted", True),
    "string": lambda net: setattr(net, "mode", "max"),
    "nested": lambda net: setattr(net, "sizes", (1, [2, 4])),
    "dict": lambda net: net.table.update(a=2.0),
    "dataclass": lambda net: setattr(net.settings, "gain", 2.0),
    "tensor": lambda net: net.bias.add_(1),
    "hidden buffer": lambda net: net.hidden.add_(1),
    "scalar of numpy": lambda net: setattr(net, "gain", np.float32(2)),
    "array of numpy": lambda net: setattr(net, "gains", np.ones(2)),
    "of a layer": lambda net: setattr(net.fc, "gain", 2.0),
    "method": lambda net: setattr(net, "score", types.MethodType(lambda self, x: -x, net)),
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_changed_attribute_gives_another_hash(written: Callable[[str], Any], name: str) -> None:
    net = written(CODE).teacher()
    first = state_hash(net)
    assert state_hash(copy.deepcopy(net)) == first
    ATTRIBUTES[name](net)
    assert state_hash(net) != first


def test_what_packages_define_counts_by_its_attributes_only() -> None:
    model = models.create("resnet8", 10)
    assert not state_hash(model).endswith("own")
    blocks = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Upsample(scale_factor=2.0))
    first = state_hash(blocks)
    blocks[1].align_corners = True  # not in its repr
    assert state_hash(blocks) != first
    one, two = (LogitsOnly(nn.Flatten(), f"no module of {folder}/t.pth is named for it") for folder in ("a", "b"))
    assert state_hash(one) == state_hash(two)


def test_the_code_of_an_installed_package_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An update of a package would refuse every cache and run."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "installed_teacher.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(folder))
    assert not state_hash(importlib.import_module("installed_teacher").teacher()).endswith("own")
    sys.modules.pop("installed_teacher")


def test_the_code_of_a_split_model_counts() -> None:
    class Net(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.fc, self.factor = nn.Conv2d(3, 4, 1), nn.Linear(4, 10), factor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.conv(x).mean((2, 3))) * self.factor

    image = torch.rand(1, 3, 4, 4)
    one, two, three = (state_hash(split(Net(factor).eval(), "conv", image)) for factor in (1.0, 1.0, 2.0))
    assert one == two != three


def test_caches_of_earlier_versions_fit_teachers_of_packages_only(tmp_path: Path) -> None:
    zoo, own = (state_hash(model) for model in (models.create("resnet8", 10), SmallNet()))
    assert same_teacher(zoo.partition(".")[0], zoo) and not same_teacher(own.partition(".")[0], own)
    assert not same_teacher("0" * 64, zoo)
    teachers = make_teachers()
    build(tmp_path, teachers)
    manifest, key = tmp_path / "manifest.000.json", make_key(teachers)
    text = manifest.read_text()
    for digest in teachers.hashes:
        text = text.replace(digest, digest.partition(".")[0])
    manifest.write_text(text)
    with pytest.raises(CacheError, match="teacher 0 has code of its own, which earlier versions did not compare"):
        TeacherCache.open(tmp_path, key)


class Extra(SmallNet):
    """A state that is not tensors only, as of torchao and others."""

    gain = 1.0

    def get_extra_state(self) -> Any:
        return {"gain": self.gain, "names": ["a", "b"]}

    def set_extra_state(self, state: Any) -> None:
        self.gain = state["gain"]


def test_states_that_are_no_tensors_count() -> None:
    one, two = Extra(), Extra()
    for model in (one, two):
        model.load_state_dict(one.state_dict())
    assert state_hash(one) == state_hash(two)
    two.gain = 2.0
    assert state_hash(one) != state_hash(two)


@pytest.mark.parametrize("make", [lambda x: x.to_sparse(), lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)])
def test_tensors_without_plain_memory_count(make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model = nn.Linear(3, 3)
    model.register_buffer("table", make(torch.eye(3)))
    before = state_hash(model)
    assert before == state_hash(model)
    model.table = make(2 * torch.eye(3))
    assert state_hash(model) != before


@pytest.mark.parametrize(("name", "values"), [
    ("name_or_path", ("/a/model", "b/model")), ("folder", ("/tmp/one", "C:\\two")), ("device", ("cuda:0", "cuda:1")),
])  # fmt: skip
def test_where_a_teacher_is_does_not_count(name: str, values: tuple[str, str]) -> None:
    model, found = SmallNet(), set()
    for value in values:
        setattr(model, name, value)
        found.add(state_hash(model))
    assert len(found) == 1


def test_a_cache_is_not_replayed_for_an_edited_teacher(tmp_path: Path) -> None:
    """Its numbers are those of the attribute that the teacher had when the cache was written."""
    teachers = make_teachers()
    build(tmp_path, teachers)
    module: Any = teachers._modules[1]
    module.temperature = 2.0
    with pytest.raises(CacheError, match=r"teacher 1 has other code or attributes.*remove this one") as caught:
        TeacherCache.open(tmp_path, make_key(LiveTeachers(teachers._modules, None)))
    assert "teacher 0" not in str(caught.value)
