"""Checkpoint files of other programs: every layout is read, and no file runs code."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import re
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from camkd_fast import models
from camkd_fast.models import sources
from camkd_fast.models.checkpoint_files import read

CORE = "numpy._core" if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else "numpy.core"
FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])


def weights() -> dict[str, Tensor]:
    return OrderedDict(
        {
            "conv.weight": torch.randn(2, 3),
            "norm.num_batches_tracked": torch.tensor(5),
            "half": torch.randn(4).bfloat16(),
            "view": torch.randn(3, 4)[:, 1],  # strided, on a larger storage
        }
    )


def saved(path: Path, content: object, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[key], t) and found[key].dtype == t.dtype for key, t in expected.items()
    )


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path, call: Any = os.mkdir) -> None:
        self.path, self.call = path, call

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return self.call, (str(self.path),)


class OtherModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)


def rename_in(path: Path, old: bytes, new: bytes, occurs: bool) -> None:
    """Replace a global's module in the pickle of a checkpoint."""
    if not zipfile.is_zipfile(path):
        data = path.read_bytes()
        assert (old in data) == occurs
        path.write_bytes(data.replace(old, new))
        return
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    assert any(old in data for data in members.values()) == occurs
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(name, data.replace(old, new))


# --- what is read ----------------------------------------------------------------------------------------------------


@FORMATS
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
@pytest.mark.parametrize(
    "prefix",
    [
        *("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "model._orig_mod."),
        *("model.module.", "model.module._orig_mod.", "_orig_mod.model.module."),
    ],
)
def test_every_layout_gives_the_tensors(tmp_path: Path, zipped: bool, wrapper: str | None, prefix: str) -> None:
    tensors = weights()
    content: Any = OrderedDict((prefix + key, t) for key, t in tensors.items())
    if wrapper is not None:
        content = {"epoch": 240, wrapper: content, "best_acc": torch.tensor(74.6), "lr": [0.1, None, (1, "a")]}
    assert same(read(saved(tmp_path / "a.pth", content, zipped)), tensors)


@pytest.mark.parametrize("outside", ["", "model.", "_orig_mod."])
def test_the_count_of_an_averaged_model_is_left_out(tmp_path: Path, outside: str) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(OtherModel())
    state = {outside + key: t for key, t in averaged.state_dict().items()}
    assert outside + "n_averaged" in state
    for content in (state, {"state_dict": state}):
        assert same(read(saved(tmp_path / "a.pth", content)), averaged.module.state_dict())
    for name in ("fc.weight", "model.weight"):  # of another program
        beside = {"n_averaged": torch.tensor(3), name: torch.ones(2)}
        assert same(read(saved(tmp_path / "a.pth", beside)), beside)


def test_checkpoints_of_lightning(tmp_path: Path) -> None:
    model = models.create("resnet8", 10)
    content = {
        "epoch": 3, "pytorch-lightning_version": "2.6.6", "loops": {}, "hyper_parameters": {"lr": 0.1},
        "state_dict": {f"model.{key}": t for key, t in model.state_dict().items()}, "optimizer_states": [],
    }  # fmt: skip
    found = sources.load(f"resnet8@{saved(tmp_path / 'a.ckpt', content)}").model
    assert same(found.state_dict(), model.state_dict())


def test_a_prefix_of_some_names_is_part_of_them(tmp_path: Path) -> None:
    tensors = {"module.a": torch.ones(1), "b": torch.ones(2)}
    assert same(read(saved(tmp_path / "a.pth", tensors)), tensors)


@FORMATS
def test_parameters_are_detached(tmp_path: Path, zipped: bool) -> None:
    module = nn.Linear(2, 2)
    found = read(saved(tmp_path / "a.pth", dict(module.named_parameters()), zipped))
    assert torch.equal(found["weight"], module.weight) and not any(t.requires_grad for t in found.values())


@FORMATS
@pytest.mark.parametrize("extra", [np.float64(74.61), np.float32(0.1), np.int64(-3), argparse.Namespace(lr=0.1, m=[1])])
@pytest.mark.parametrize("numpy_1", [True, False])
def test_the_accuracy_may_be_a_numpy_scalar_and_options_a_namespace(
    tmp_path: Path, zipped: bool, extra: object, numpy_1: bool
) -> None:
    tensors = weights()
    path = saved(tmp_path / "a.pth", {"model": tensors, "extra": extra, "last": 1}, zipped)
    if numpy_1:
        rename_in(path, f"{CORE}.multiarray".encode(), b"numpy.core.multiarray", isinstance(extra, np.generic))
    assert same(read(path), tensors)


@pytest.mark.parametrize("value", [np.float64(74.61), np.float32(0.1), np.int64(-3), np.array(0.1, ">f8")[()]])
def test_stand_ins_keep_the_value_of_scalars(tmp_path: Path, value: Any) -> None:
    from camkd_fast.models import checkpoint_files

    loaded = checkpoint_files._load_pickled(saved(tmp_path / "a.pth", [value]))
    assert loaded == [value.item()] and type(loaded[0]) is type(value.item())


def test_big_endian_scalars() -> None:
    from camkd_fast.models.checkpoint_files import _Dtype, _scalar

    dtype = _Dtype("f8", False, True)
    dtype.__setstate__((3, ">"))
    assert _scalar(dtype, np.array(0.1, ">f8").tobytes()) == 0.1


def test_the_allow_list_is_gone_after_reading(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    read(saved(tmp_path / "a.pth", weights()))
    with pytest.raises(ValueError, match="refused"):
        read(saved(tmp_path / "b.pth", {"x": Trap(tmp_path / "no")}))
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(saved(tmp_path / "c.pth", {"x": np.float64(1)}), weights_only=True)


def test_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {"module.a": torch.randn(2, 3), "module.b": torch.tensor(3)}
    save_file(tensors, tmp_path / "weights")  # known by its content, not by a suffix
    assert same(read(tmp_path / "weights"), {"a": tensors["module.a"], "b": tensors["module.b"]})


# --- what is refused -------------------------------------------------------------------------------------------------


def refusal(path: Path) -> str:
    """The message, which is one line that begins with the file."""
    with pytest.raises(ValueError) as info:
        read(path)
    message = str(info.value)
    assert message.startswith(f"{path} ") and "\n" not in message
    return message.removeprefix(f"{path} ")


@FORMATS
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(
    ("model", "name"),
    [
        (lambda: models.create("resnet8", 2), "camkd_fast.models.resnet.ResNet"),
        (OtherModel, f"{__name__}.OtherModel"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), "torch.nn.modules.container.Sequential"),
    ],
)
def test_a_whole_model_is_refused_with_its_class(
    tmp_path: Path, zipped: bool, inside: bool, model: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, __name__, sys.modules[OtherModel.__module__])
    module = model()
    path = saved(tmp_path / "a.pth", {"epoch": 1, "model": module} if inside else module, zipped)
    message = refusal(path)
    assert message.startswith(f"is a whole pickled model ({name}), ") and "save the model's state_dict()" in message


@FORMATS
def test_code_in_a_file_is_named_and_never_run(tmp_path: Path, zipped: bool) -> None:
    for call, name in ((os.mkdir, f"{os.mkdir.__module__}.mkdir"), (exec, "builtins.exec"), (print, "builtins.print")):
        trap = tmp_path / "trap"
        path = saved(tmp_path / "a.pth", {"model": weights(), "x": Trap(trap, call)}, zipped)
        shown = name.replace("builtins", "__builtin__")  # its name in protocol 2
        assert refusal(path).startswith(f"is refused, because it names code ({shown}): save the model's state_dict()")
        assert not trap.exists()


@FORMATS
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (np.complex64(1), "is refused: it has a numpy scalar of type <c8, not of float32, float64 or int64"),
        (np.uint8(1), "is refused: it has a numpy scalar of type |u1, not of float32, float64 or int64"),
        (np.ones(3), f"is refused, because it names code ({CORE}.multiarray._reconstruct, numpy.ndarray): "),
        (Path("x"), "is refused, because it names code (pathlib."),
    ],
)
def test_other_objects_are_refused(tmp_path: Path, zipped: bool, value: object, reason: str) -> None:
    assert refusal(saved(tmp_path / "a.pth", {"model": weights(), "x": value}, zipped)).startswith(reason)


def test_many_names_are_not_all_listed(tmp_path: Path) -> None:
    calls = [os.mkdir, os.rmdir, os.remove, os.chdir, os.listdir, os.stat, os.chmod]
    message = refusal(saved(tmp_path / "a.pth", [Trap(tmp_path, call) for call in calls]))
    assert message.count(f"{os.mkdir.__module__}.") == 5 and " and 2 more): " in message


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_other_programs_are_not_opened(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(Trap(tmp_path / "trap"), protocol=protocol))
    begins = "begins with b'c" if protocol < 2 else "is a pickle of another program: expected a checkpoint"
    assert refusal(path).startswith(begins) and not (tmp_path / "trap").exists()


def test_newer_pickle_protocols_inside_a_checkpoint(tmp_path: Path) -> None:
    """weights_only=True refuses their opcodes; the name is read from the strings before it."""
    path = tmp_path / "a.pth"
    torch.save({"x": Trap(tmp_path / "trap")}, path, pickle_protocol=4)
    assert refusal(path).startswith(f"is refused, because it names code ({os.mkdir.__module__}.mkdir): ")
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([1, 2], "got a list"),
        (torch.ones(2), "got a Tensor"),
        ({}, "got an empty one"),
        ({"model": {}}, "got an empty one"),
        ({"epoch": 3, "net": {}}, "got 'epoch' of type int among 'epoch', 'net'"),
        ({"model": {"a": torch.ones(1), "b": 2}}, "got 'b' of type int among 'a', 'b'"),
        ({3: torch.ones(1)}, "got 3 of type Tensor among 3"),
        ({str(i): i for i in range(9)}, "among '0', '1', '2', '3', '4', ..."),
    ],
)
def test_a_file_without_a_state_dict(tmp_path: Path, content: object, found: str) -> None:
    message = refusal(saved(tmp_path / "a.pth", content))
    assert message.startswith("has no state dict: expected tensors by name, or a dict of them under 'model' or ")
    assert message.endswith(found)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty: expected a checkpoint written by torch.save"),
        (b"<!DOCTYPE html><html>", "begins with b'<!DOCTYPE html>': expected a checkpoint"),
        (b"version https://git-lfs", "begins with b'version https:/': expected a checkpoint"),
        (b"PK\x03\x04 and no archive", "is truncated or damaged: "),
    ],
)
def test_files_of_other_kinds(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    assert refusal(tmp_path / "a.pth").startswith(reason)


@pytest.mark.filterwarnings("error", "ignore:`torch.jit")
def test_archives_of_other_kinds(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "text")
    assert refusal(tmp_path / "a.zip") == "is a zip archive, but none that torch.save wrote"
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "a.pt"))
    assert refusal(tmp_path / "a.pt").startswith("is a TorchScript program, which is code: save the model's")


def test_a_missing_file_or_a_folder_is_an_os_error(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.pth", tmp_path):
        with pytest.raises(OSError, match=re.escape(str(path))):
            read(path)


def test_safetensors_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "a")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert refusal(tmp_path / "a") == "needs safetensors, which is not installed (pip install 'camkd-fast[train]')"
    assert same(read(saved(tmp_path / "b", {"a": torch.ones(1)})), {"a": torch.ones(1)})


def contents() -> dict[str, bytes]:
    from safetensors.torch import save

    found = {}
    for name, zipped in (("zip", True), ("old", False)):
        buffer = io.BytesIO()
        torch.save({"model": weights(), "acc": np.float64(1)}, buffer, _use_new_zipfile_serialization=zipped)
        found[name] = buffer.getvalue()
    return {**found, "safetensors": save({key: t.contiguous() for key, t in weights().items()})}


CONTENTS = contents()


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_truncated_file_of_any_length_is_refused(tmp_path: Path, kind: str) -> None:
    data, path = CONTENTS[kind], tmp_path / "a.pth"
    for length in {*range(0, len(data), 37), len(data) - 1}:
        path.write_bytes(data[:length])
        refusal(path)
    path.write_bytes(data[: len(data) - 4])
    assert refusal(path).startswith("is truncated or damaged: ")


@settings(max_examples=150)
@given(kind=st.sampled_from(sorted(CONTENTS)), data=st.data())
def test_damage_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    content = bytearray(CONTENTS[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "a.pth"
    path.write_bytes(content)
    try:
        found = read(path)
    except ValueError as error:
        assert str(error).startswith(f"{path} ") and "\n" not in str(error)
    else:
        assert all(isinstance(t, Tensor) for t in found.values())
