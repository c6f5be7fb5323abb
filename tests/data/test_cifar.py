"""CIFAR: small archives in the published layout with Python 2 pickles, and the refusal of other pickles."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from camkd_fast.data import catalogue
from camkd_fast.data.cifar import (
    CIFAR10,
    CIFAR100,
    STAND_INS,
    RefusedPickleError,
    load_cifar10,
    load_cifar100,
    read_pickle,
)
from camkd_fast.data.fetch import default_folder

pytestmark = pytest.mark.usefixtures("own_data_folder")


def python2_pickle(value: Any, numpy_core: str = "numpy.core") -> bytes:
    """Protocol 2 as Python 2 wrote it: strings are bytes, arrays are made by numpy's constructor."""
    return b"\x80\x02" + _opcodes(value, numpy_core.encode()) + b"."


def _opcodes(value: Any, core: bytes) -> bytes:
    if isinstance(value, dict):
        items = b"".join(_opcodes(k, core) + _opcodes(v, core) for k, v in value.items())
        return b"}(" + items + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(_opcodes(item, core) for item in value) + b"e"
    if isinstance(value, bytes):
        return b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    assert isinstance(value, np.ndarray)
    kind = value.dtype.str[1:].encode()
    fortran = not value.flags.c_contiguous
    shape = b"(" + b"".join(_opcodes(n, core) for n in value.shape) + b"t"
    dtype = b"cnumpy\ndtype\n" + _opcodes(kind, core) + b"K\x00K\x01\x87R(K\x03" + _opcodes(b"|", core)
    dtype += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    content = _opcodes(value.tobytes(order="F" if fortran else "C"), core)
    return (
        b"c" + core + b".multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + _opcodes(b"b", core) + b"\x87R"
        b"(K\x01" + shape + dtype + (b"\x88" if fortran else b"\x89") + content + b"tb"
    )


def pixels_of(labels: list[int], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (len(labels), 3072), dtype=np.uint8)


def cifar10_files(per_batch: int = 6) -> dict[str, bytes]:
    """Five training batches and a test batch; labels cycle through the ten classes."""
    files = {}
    for i, name in enumerate((*CIFAR10.train, CIFAR10.test)):
        labels = [(i * per_batch + n) % 10 for n in range(per_batch)]
        batch = {b"batch_label": name.encode(), b"labels": labels, b"data": pixels_of(labels, i)}
        files[name] = python2_pickle({**batch, b"filenames": [b"x.png"] * per_batch})
    return files


def cifar100_files() -> dict[str, bytes]:
    labels = [*range(100), *range(100), *range(100)]
    keys = {b"filenames": [b"x.png"], b"coarse_labels": [0] * 300}
    train = python2_pickle({**keys, b"fine_labels": labels, b"data": pixels_of(labels, 0)})
    return {"train": train, "test": python2_pickle({**keys, b"fine_labels": [99, 3], b"data": pixels_of([99, 3], 1)})}


def archive(path: Path, folder: str, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in {**files, "readme.html": b"<html>"}.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_cifar10_is_read_from_the_archive_and_from_the_extracted_folder(tmp_path: Path) -> None:
    root = tmp_path / "root"
    path = archive(root / "cifar-10-python.tar.gz", CIFAR10.folder, cifar10_files())
    train, test = load_cifar10(root)
    expected = np.concatenate([pixels_of([0] * 6, i) for i in range(5)]).reshape(30, 3, 32, 32)
    assert np.array_equal(train.pixels.numpy(), expected)
    assert np.array_equal(test.pixels.numpy(), pixels_of([0] * 6, 5).reshape(6, 3, 32, 32))
    assert train.labels.tolist() == [n % 10 for n in range(30)] and train.labels.dtype == torch.int64
    assert train.shape == (3, 32, 32) and train.channels == 3 and train.num_classes == 10
    assert train.mean == test.mean and all(0 < level < 255 for level in train.mean)

    with tarfile.open(path) as tar:
        for member in tar:
            if content := tar.extractfile(member):
                target = tmp_path / "extracted" / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content.read())
    for other in (path, tmp_path / "extracted", tmp_path / "extracted" / CIFAR10.folder):
        again, _ = load_cifar10(other)
        assert again.fingerprint() == train.fingerprint()


def test_cifar100_has_the_fine_classes_and_a_stratified_validation_part(tmp_path: Path) -> None:
    archive(default_folder("cifar100") / "cifar-100-python.tar.gz", CIFAR100.folder, cifar100_files())
    train, test = load_cifar100(default_folder("cifar100"))
    assert (len(train), len(test), train.num_classes) == (300, 2, 100)
    assert train.mean == pytest.approx((0.5071 * 255, 0.4867 * 255, 0.4408 * 255))
    assert train.std == pytest.approx((0.2675 * 255, 0.2565 * 255, 0.2761 * 255))
    splits = catalogue.load("cifar100", validation=1 / 3)
    assert splits.train.labels.bincount().tolist() == [2] * 100
    assert splits.validation.labels.bincount().tolist() == [1] * 100
    assert splits.test.labels.tolist() == [99, 3]
    assert splits.train.mean == splits.validation.mean == splits.test.mean
    other = catalogue.load("cifar100", validation=1 / 3, split_seed=1)
    assert other.validation.fingerprint() != splits.validation.fingerprint()
    assert other.test.fingerprint() == splits.test.fingerprint()


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_python_2_arrays_are_read_under_both_names_of_numpys_module(core: str, order: Any) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(4, 6).copy(order=order)
    batch = read_pickle(python2_pickle({b"data": array, b"labels": [1, -2]}, core), "batch")
    assert np.array_equal(batch[b"data"].numpy(), array) and batch[b"labels"] == [1, -2]
    # numpy itself reads the same from these opcodes, so they are what Python 2 wrote.
    truth = pickle.loads(python2_pickle({b"data": array}), encoding="bytes")
    assert np.array_equal(truth[b"data"], array)


ARRAYS = {
    "rows": np.arange(24, dtype=np.uint8).reshape(4, 6),
    "columns": np.arange(24, dtype=np.uint8).reshape(6, 4).T,
    "axes": np.arange(24, dtype=np.uint8).reshape(2, 3, 4).transpose(1, 0, 2),
    "steps": np.arange(24, dtype=np.uint8).reshape(4, 6)[:, ::2],
    "read-only": np.frombuffer(bytes(range(24)), dtype=np.uint8).reshape(4, 6),
    "empty": np.zeros((0, 3072), dtype=np.uint8),
    "scalar": np.array(7, dtype=np.uint8),
}
every_protocol = pytest.mark.parametrize("protocol", [2, 3, 4, 5])


@every_protocol
@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"], ids=["numpy 1", "numpy 2"])
@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS.keys())
def test_arrays_pickled_again_by_python_3_are_read(protocol: int, core: bytes, array: np.ndarray) -> None:
    batch = {b"data": array, "names": ["é", b"b", b"", None, 1.5, (True,)], "more": {b"x": [2**40]}}
    content = pickle.dumps(batch, protocol=protocol)
    if core == b"numpy.core":
        content = renamed(content)
    read = read_pickle(content, "batch")
    assert np.array_equal(read[b"data"].numpy(), array) and read[b"data"].shape == array.shape
    assert (read["names"], read["more"]) == (batch["names"], batch["more"])


def renamed(content: bytes) -> bytes:
    """The pickle as numpy 1 writes it: a module's name is a line, or a string after its length."""
    for module in (b"numpy._core.multiarray", b"numpy._core.numeric"):
        old = module.replace(b"_core", b"core")
        content = content.replace(b"c" + module, b"c" + old)
        content = content.replace(b"\x8c" + bytes([len(module)]) + module, b"\x8c" + bytes([len(old)]) + old)
    # The frame's length no longer holds; a pickle needs no frames.
    at = content.find(b"\x95")
    return content if at != 2 else content[:2] + content[11:]


@every_protocol
@pytest.mark.parametrize("load", [load_cifar10, load_cifar100])
def test_archives_pickled_again_by_python_3_are_read(tmp_path: Path, protocol: int, load: Callable[..., Any]) -> None:
    layout, files = (CIFAR10, cifar10_files()) if load is load_cifar10 else (CIFAR100, cifar100_files())
    expected = load(archive(tmp_path / "a.tar.gz", layout.folder, files))
    again = {name: pickle.dumps(pickle.loads(content, encoding="latin1"), protocol) for name, content in files.items()}
    found = load(archive(tmp_path / "b.tar.gz", layout.folder, again))
    assert [part.fingerprint() for part in found] == [part.fingerprint() for part in expected]


@every_protocol
@pytest.mark.parametrize("binary", [False, True], ids=["str", "bytes"])
def test_class_names_come_from_the_meta_file(tmp_path: Path, protocol: int, binary: bool) -> None:
    names = [f"class {n}" for n in range(10)]
    fields = {"num_cases_per_batch": 10000, "label_names": [n.encode() if binary else n for n in names]}
    meta = pickle.dumps({k.encode() if binary else k: v for k, v in fields.items()}, protocol)
    path = archive(tmp_path / "cifar-10-python.tar.gz", CIFAR10.folder, {**cifar10_files(), "batches.meta": meta})
    with tarfile.open(path) as tar:
        tar.extractall(tmp_path / "there", filter="data")
    for root in (path, tmp_path / "there", tmp_path / "there" / CIFAR10.folder):
        assert [part.class_names for part in load_cifar10(root)] == [tuple(names)] * 2
    (tmp_path / "there" / CIFAR10.folder / "batches.meta").unlink()
    assert [part.class_names for part in load_cifar10(tmp_path / "there")] == [None] * 2


def test_cifar100_has_the_names_of_its_fine_classes(tmp_path: Path) -> None:
    fine, coarse = ([f"{kind}{n}".encode() for n in range(count)] for kind, count in (("f", 100), ("c", 20)))
    meta = python2_pickle({b"fine_label_names": fine, b"coarse_label_names": coarse})
    path = archive(tmp_path / "a.tar.gz", CIFAR100.folder, {**cifar100_files(), "meta": meta})
    assert load_cifar100(path)[0].class_names == tuple(name.decode() for name in fine)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"label_names": ["a"] * 9}, "must be a list of 10 names, got 9 values"),
        ({"label_names": [1] * 10}, "must be a list of 10 names, got 10 values"),
        ({"label_names": b"abcdefghij"}, "got bytes"),
        ({}, "got NoneType"),
        ([], "holds a list, expected a dict"),
        ({"label_names": Path("x")}, "pathlib.*refused"),
    ],
)
def test_invalid_class_names_are_refused(tmp_path: Path, meta: Any, message: str) -> None:
    files = {**cifar10_files(), "batches.meta": pickle.dumps(meta)}
    with pytest.raises(ValueError, match=f"batches.meta.*{message}"):
        load_cifar10(archive(tmp_path / "a.tar.gz", CIFAR10.folder, files))


class Calling:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_pickle_with_a_global_is_refused_by_name_and_not_run(tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "ran"
    evil = pickle.dumps({b"data": Calling(os.system, f"touch {marker}")}, protocol=protocol)
    with pytest.raises(RefusedPickleError, match=r"data_batch_2.*(posix|nt)\.system, which is refused"):
        load_cifar10(archive(tmp_path / "a.tar.gz", CIFAR10.folder, {**cifar10_files(), "data_batch_2": evil}))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("refused", "name"),
    [
        (Calling(eval, "1"), r"builtin.*\.eval"),
        (Calling(getattr, "text", "upper"), r"builtin.*\.getattr"),
        (np.float64(1.0), r"numpy.*multiarray\.scalar"),
        (np.zeros((2, 2), dtype=object), r"array of type 'O8'"),
        (np.zeros(3, dtype=np.float32), r"array of type 'f4'"),
        (np.zeros(3, dtype=np.int8), r"array of type 'i1'"),
        (torch.zeros(1), r"torch\._utils"),
        (Path("x"), r"pathlib"),
        (bytearray(b"x"), r"bytearray"),
        ({1, 2}, r"set"),
        (1j, r"complex"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_other_globals_scalars_and_types_are_refused(refused: Any, name: str, protocol: int) -> None:
    if protocol >= {set: 4, bytearray: 5}.get(type(refused), 6):
        return  # opcodes of their own, which name nothing
    with pytest.raises(RefusedPickleError, match=name):
        read_pickle(pickle.dumps([refused], protocol=protocol), "batch")


def test_arrays_outside_the_pickle_are_refused() -> None:
    buffers: list[Any] = []
    content = pickle.dumps({b"data": ARRAYS["rows"]}, protocol=5, buffer_callback=buffers.append)
    assert buffers
    with pytest.raises(ValueError, match=r"batch is not a readable pickle.*out-of-band"):
        read_pickle(content, "batch")


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n}U\x01xK\x01sb.",  # state for the stand-in class
        b"\x80\x02cnumpy\nndarray\nN}U\x01xK\x01s\x86b.",  # state in slots
        b"\x80\x02c_codecs\nencode\n}U\x01xK\x01sb.",
        b"\x80\x02cnumpy.core.numeric\n_frombuffer\n}U\x01xK\x01sb.",
        b"\x80\x02c__builtin__\nbytes\nK\x05\x85R.",  # more than empty bytes
        b"\x80\x02cnumpy.core.numeric\n_frombuffer\n)R.",
        b"\x80\x02cnumpy\nndarray\n)R}U\x01xK\x01sb.",
        b"\x80\x02ccamkd_fast.data.cifar\nSTAND_INS\n.",
        b"\x80\x02\x82\x01.",  # extension registry
        b"\x80\x02U\x01xQ.",  # persistent id
        b"\x80\x02K\x01K\x01R.",  # call of a number
        b"",
        b"no pickle",
    ],
)
def test_other_opcodes_are_refused(program: bytes) -> None:
    before = {stand_in: set(vars(stand_in)) for stand_in in STAND_INS.values()}
    with pytest.raises(ValueError, match=r"batch|a pickle gives"):
        read_pickle(program, "batch")
    assert before == {stand_in: set(vars(stand_in)) for stand_in in STAND_INS.values()}


def test_a_pickle_cut_anywhere_is_refused() -> None:
    whole = python2_pickle({b"labels": [1, 2], b"data": np.zeros((1, 4), dtype=np.uint8)})
    for length in range(len(whole)):
        with pytest.raises(ValueError, match="batch is not a readable pickle"):
            read_pickle(whole[:length], "batch")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_archive_is_refused_with_both_sizes(tmp_path: Path, share: float) -> None:
    path = archive(tmp_path / "cifar-10-python.tar.gz", CIFAR10.folder, cifar10_files(20))
    length = int(share * path.stat().st_size)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=rf"truncated or damaged .*\b{length} bytes.* 170498071"):
        load_cifar10(tmp_path)


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "cifar-10-python.tar.gz", CIFAR10.folder, cifar10_files())
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 200] = bytes(200)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cifar-10-python\.tar\.gz"):
        load_cifar10(tmp_path)
    path.write_bytes(b"not gzip at all" * 100)
    with pytest.raises(ValueError, match="truncated or damaged"):
        load_cifar10(tmp_path)


def test_cifar_with_invalid_contents_is_refused(tmp_path: Path) -> None:
    def load(files: dict[str, bytes]) -> None:
        load_cifar10(archive(tmp_path / "a.tar.gz", CIFAR10.folder, files))

    def batch(**changes: Any) -> bytes:
        fields = {"labels": [0, 1], "data": np.zeros((2, 3072), np.uint8)} | changes
        return python2_pickle({key.encode(): value for key, value in fields.items()})

    good = cifar10_files()
    with pytest.raises(ValueError, match=r"lacks cifar-10-batches-py/data_batch_3, cifar-10-batches-py/test_batch"):
        load({name: content for name, content in good.items() if name not in ("data_batch_3", "test_batch")})
    with pytest.raises(ValueError, match=r"test_batch.*label 10 of image 1 lies outside \[0, 10\)"):
        load({**good, "test_batch": batch(labels=[0, 10])})
    with pytest.raises(ValueError, match=r"label -1 of image 0"):
        load({**good, "test_batch": batch(labels=[-1, 3])})
    with pytest.raises(ValueError, match="holds 2 images and 3 labels"):
        load({**good, "test_batch": batch(labels=[0, 1, 2])})
    with pytest.raises(ValueError, match=r"must be an array \(n, 3072\), got \(2, 3073\)"):
        load({**good, "test_batch": batch(data=np.zeros((2, 3073), np.uint8))})
    with pytest.raises(ValueError, match=r"must be an array \(n, 3072\), got list"):
        load({**good, "test_batch": batch(data=[1])})
    with pytest.raises(ValueError, match="labels must be a list of int, got bytes"):
        load({**good, "test_batch": batch(labels=b"01")})
    with pytest.raises(ValueError, match="holds a list, expected a dict"):
        load({**good, "test_batch": python2_pickle([1])})


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_missing_cifar_says_how_to_get_it(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"camkd-fast data fetch {name}"):
        catalogue.load(name)
