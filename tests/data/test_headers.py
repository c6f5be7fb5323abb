"""Headers of image files: damaged files are found before training, and unchanged ones are read only once."""

from __future__ import annotations

import logging
import os
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from camkd_fast.data import BadImageError, ImageFiles, LabelledImages, LoaderConfig, Splits, decode, headers
from camkd_fast.data.headers import read_headers
from camkd_fast.data.unreadable import find_unreadable
from camkd_fast.train import run
from camkd_fast.train.config import DataConfig, LogConfig, OptimConfig, TeachConfig
from tests.support.loader_data import CROP, MEAN, STD, by_sample, opened, picture


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMKD_FAST_CACHE", str(tmp_path / "cache"))


def image(path: Path, format: str = "JPEG", H: int = 20, W: int = 30) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(np.random.default_rng(len(path.name)), H, W).save(path, format)
    return path


def images(folder: Path, N: int = 6) -> list[Path]:
    return [image(folder / f"{n}.jpg", H=20 + n) for n in range(N)]


def image_set(paths: list[Path], size: int = 16) -> ImageFiles:
    return ImageFiles(tuple(paths), torch.arange(len(paths)) % 2, 2, ("a", "b"), MEAN, STD, size)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Names of the files whose header was read, with the number of times."""
    names: Counter[str] = Counter()
    original = decode.read_header

    def counted(path: Path) -> decode.Header:
        names[path.name] += 1
        return original(path)

    monkeypatch.setattr(decode, "read_header", counted)
    return names


# --- damage ----------------------------------------------------------------------------------------------------------


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header names any size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def damage_inside(path: Path) -> None:
    """Write a PNG that is complete by its header and its end."""
    content, half = image(path, "PNG", 32, 32).read_bytes(), path.stat().st_size // 2
    path.write_bytes(content[:half] + bytes(100) + content[half + 100 :])


def cut(format: str) -> Callable[[Path], Any]:
    def write(path: Path) -> None:
        image(path, format)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return write


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "the file is empty"),
    "text": (lambda path: path.write_text("<html>404 not found</html>"), "not an image in a supported format"),
    "zeros": (lambda path: path.write_bytes(bytes(5000)), "not an image in a supported format"),
    "header only": (lambda path: path.write_bytes(image(path).read_bytes()[:40]), r"\w"),
    **{f"half a {format}": (cut(format), r"\w") for format in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")},
    "folder": (lambda path: path.mkdir(), "a folder"),
    "pipe": (lambda path: os.mkfifo(path), "no regular file"),
    "missing": (lambda path: None, "No such file"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "endless link": (lambda path: path.symlink_to(path.name), "Too many levels"),
    "no pixels": (lambda path: path.write_bytes(png_of(0, 7)), r"\w"),
    "bomb": (lambda path: path.write_bytes(png_of(40000, 40000)), "DecompressionBombError"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_by_headers(tmp_path: Path, damage: str) -> None:
    write, reason = DAMAGE[damage]
    paths = [*images(tmp_path, 3), tmp_path / "bad.jpg"]
    write(paths[3])
    found = read_headers(paths)
    assert list(found.problems) == [3]
    with pytest.raises(ValueError, match=rf"^{reason}") as caught:
        raise ValueError(found.problems[3])
    assert "\n" not in str(caught.value) and str(tmp_path) not in str(caught.value)
    assert found.sizes.tolist() == [[20, 30], [21, 30], [22, 30], [0, 0]] and found.exact.all()
    with pytest.raises(ValueError):  # the loaders agree
        decode.open_rgb(paths[3])


def test_a_file_without_permission_is_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated, because permissions do not stop the superuser."""
    paths, original = images(tmp_path), Path.open

    def refuse(path: Path, *mode: Any) -> Any:
        if path == paths[2]:
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *mode)

    monkeypatch.setattr(Path, "open", refuse)
    assert read_headers(paths).problems == {2: "Permission denied"}


# --- the cache -------------------------------------------------------------------------------------------------------


def test_unchanged_files_are_read_once(tmp_path: Path, read: Counter[str]) -> None:
    paths = [*images(tmp_path / "set"), image(tmp_path / "set" / "x.gif", "GIF")]
    first = read_headers(paths)
    assert set(read.values()) == {1} and len(read) == 7
    again = read_headers(paths[::-1])
    assert set(read.values()) == {1}
    assert again.sizes.tolist() == first.sizes.tolist()[::-1] and not again.problems
    assert first.exact.tolist() == [True] * 6 + [False] == again.exact.tolist()[::-1]


def test_changed_and_new_files_are_read_again(tmp_path: Path, read: Counter[str]) -> None:
    paths = images(tmp_path / "set")
    read_headers(paths)
    image(paths[0], H=50)  # another size
    stamp = paths[1].stat()
    os.utime(paths[1], ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    paths[2].write_bytes(b"")
    new = image(tmp_path / "set" / "new.jpg", H=9)
    found = read_headers([*paths, new])
    assert {name for name, count in read.items() if count == 2} == {"0.jpg", "1.jpg", "2.jpg"}
    assert read["new.jpg"] == 1 and found.sizes[[0, 6], 0].tolist() == [50, 9] and list(found.problems) == [2]


def test_unreadable_files_are_read_every_time(tmp_path: Path, read: Counter[str]) -> None:
    """A file can be repaired without a change of size and time; there are few of them."""
    paths = images(tmp_path / "set")
    paths[1].write_bytes(b"x")
    for _ in range(3):
        assert list(read_headers(paths).problems) == [1]
    assert read["1.jpg"] == 3 and read["0.jpg"] == 1


def test_sets_in_one_folder_share_a_cache(tmp_path: Path, read: Counter[str]) -> None:
    paths = images(tmp_path / "set")
    for part in (paths[:3], paths[3:], paths[1:5], paths):
        read_headers(part)
    assert set(read.values()) == {1}
    assert len(list((tmp_path / "cache" / "headers").iterdir())) == 1  # no temporary file is left


def test_a_cache_does_not_grow_with_changes(tmp_path: Path) -> None:
    paths = images(tmp_path / "set", 4)
    for change in range(40):
        os.utime(paths[0], ns=(0, change))
        read_headers(paths)
    (cache,) = (tmp_path / "cache" / "headers").iterdir()
    assert len(np.load(cache)) <= 4 * (1 + headers._SPARE)


@pytest.mark.parametrize("content", [b"", b"no array", b"PK\x03\x04", b"\x93NUMPY\x01\x00"])
def test_a_damaged_cache_is_replaced(tmp_path: Path, content: bytes, read: Counter[str]) -> None:
    paths = images(tmp_path / "set")
    read_headers(paths)
    (cache,) = (tmp_path / "cache" / "headers").iterdir()
    cache.write_bytes(content)
    for _ in range(2):
        assert not read_headers(paths).problems
    assert set(read.values()) == {2}


def test_a_cache_of_another_kind_is_ignored(tmp_path: Path, read: Counter[str]) -> None:
    paths = images(tmp_path / "set")
    read_headers(paths)
    (cache,) = (tmp_path / "cache" / "headers").iterdir()
    np.save(cache, np.array([{}], dtype=object), allow_pickle=True)
    assert not read_headers(paths).problems and set(read.values()) == {2}


def test_no_place_for_a_cache_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = images(tmp_path / "set")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CAMKD_FAST_CACHE", str(tmp_path / "file" / "below"))  # cannot be created by anybody
    assert not read_headers(paths).problems
    monkeypatch.delenv("CAMKD_FAST_CACHE")

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert not read_headers(paths).problems
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == [f"{n}.jpg" for n in range(6)]


def test_no_files_have_no_headers() -> None:
    assert read_headers([]).sizes.shape == (0, 2)


# --- before training -------------------------------------------------------------------------------------------------


def splits(folder: Path, *bad: str) -> Splits:
    """Three splits of six files; `bad` are names such as test/2."""
    parts = {part: images(folder / part) for part in ("train", "validation", "test")}
    for name in bad:
        (folder / f"{name}.jpg").write_bytes(b"")
    return Splits(*(image_set(paths) for paths in parts.values()))


def test_damaged_files_of_every_split_are_named_and_counted(tmp_path: Path) -> None:
    parts = splits(tmp_path, "train/1", "validation/0", "test/2", "test/5")
    with pytest.raises(
        BadImageError,
        match=r"train/1\.jpg cannot be read as an image: the file is empty; nor can .*validation/0\.jpg, .*test/2\.jpg "
        r"\(4 unreadable of 18 files, at most skip_bad=3 are skipped\): replace or remove them, or set skip_bad to 4",
    ):
        find_unreadable(parts, 3)
    assert find_unreadable(parts, 4) == ((1,), (0,), (2, 5))


def test_skipped_files_are_logged_once_each(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parts = splits(tmp_path, "train/1", "test/2")
    with caplog.at_level(logging.WARNING):
        find_unreadable(parts, 5)
        find_unreadable(parts, 5, quiet=True)
    assert ["train/1" in caplog.messages[0], "(2 of skip_bad=5)" in caplog.messages[1]] == [True] * 2
    assert len(caplog.messages) == 2


def test_arrays_have_no_unreadable_images() -> None:
    part = LabelledImages(
        torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), 1, (0.0,), (1.0,)
    )
    assert find_unreadable(Splits(part, part, part), 0) == ((), (), ())


@pytest.mark.parametrize("kind", ["dali", "torch"])
def test_known_files_are_not_opened(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    data = splits(tmp_path, "test/5").test
    with opened(data, kind, 4, skip_bad=1, known_bad=(0,)) as loader, pytest.raises(BadImageError, match=r"5\.jpg"):
        list(loader)  # the known one counts
    with opened(data, kind, 4, skip_bad=1, known_bad=(5,)) as loader, caplog.at_level(logging.WARNING):
        assert [batch.index.tolist() for batch in loader] == [[0, 1, 2, 3], [4]]
        assert loader.state_dict()["bad"] == [5]
    assert not caplog.messages
    with pytest.raises(ValueError, match="2 files are unreadable, at most skip_bad=1"):
        LoaderConfig(4, skip_bad=1, known_bad=(1, 2))


@pytest.mark.parametrize("kind", ["dali", "torch"])
def test_an_evaluation_batch_without_a_readable_image_is_left_out(tmp_path: Path, kind: str) -> None:
    data = splits(tmp_path, "test/4", "test/5", "test/0", "test/1").test
    for known in (0, 1, 4, 5), (0,), ():
        with opened(data, kind, 2, skip_bad=4, known_bad=known) as loader:
            for _ in range(2):
                assert [batch.index.tolist() for batch in loader] == [[2, 3]]
        with opened(data, kind, 1, skip_bad=4, known_bad=known) as loader:
            assert [batch.index.tolist() for batch in loader] == [[2], [3]]
    damage_inside(data.paths[3])
    with opened(data, kind, 1, skip_bad=5) as loader:
        for _ in range(2):
            assert [batch.index.tolist() for batch in loader] == [[2]]


@pytest.mark.parametrize("kind", ["dali", "torch"])
def test_a_training_batch_without_a_readable_image_gets_another_one(tmp_path: Path, kind: str) -> None:
    """Training has a fixed number of steps: with batches of one every unreadable file would end the run."""
    data = splits(tmp_path, "train/2").train
    damage_inside(data.paths[3])
    for known in (2,), ():
        with opened(data, kind, 1, augmentation=CROP, skip_bad=2, known_bad=known) as loader:
            for epoch in range(3):
                loader.set_epoch(epoch)
                index = torch.cat([batch.index for batch in loader])
                assert len(index) == len(loader) == 6
                assert sorted(index.tolist()) == [0, 1, 4, 4, 4, 5]


@pytest.mark.parametrize("kind", ["dali", "torch"])
@pytest.mark.parametrize("augmentation", [None, CROP], ids=["evaluation", "training"])
def test_a_set_without_a_readable_image_is_an_error(tmp_path: Path, kind: str, augmentation: Any) -> None:
    data = splits(tmp_path, "test/0", "test/1", "test/2", "test/3", "test/4").test
    damage_inside(data.paths[5])
    message = r"no image of a batch of \d can be read"
    options = {"augmentation": augmentation, "skip_bad": 9}
    with opened(data, kind, 2, **options) as loader, pytest.raises(BadImageError, match=message):
        list(loader)


def test_files_of_known_sizes_are_decoded_alike(tmp_path: Path) -> None:
    """DALI takes the windows from cached headers."""
    data = splits(tmp_path).test
    with opened(data, "dali", 4) as first, opened(image_set(list(data.paths)), "dali", 4) as cached:
        assert torch.equal(by_sample(first)[1], by_sample(cached)[1])


def folder(root: Path) -> Path:
    for part in ("train", "val"):
        for name in ("a", "b"):
            for n in range(4):
                image(root / part / name / f"{n}.jpg", H=32, W=32)
    return root


def teach(root: Path, out: Path, **data: Any) -> run.RunResult:
    return run.teach(
        TeachConfig(
            "resnet8",
            out=out,
            data=DataConfig("folder", root, size=16, validation=0.25, workers=0, loader="torch", **data),
            optim=OptimConfig(epochs=1, batch_size=4),
            log=LogConfig(tensorboard=False, progress=False),
        )
    )


@pytest.mark.parametrize("damaged", ["val/b/3.jpg", "train/a/1.jpg"])
def test_a_run_with_a_damaged_file_ends_before_the_first_epoch(tmp_path: Path, damaged: str) -> None:
    root = folder(tmp_path / "d")
    (root / damaged).write_bytes(b"")
    with pytest.raises(BadImageError, match=rf"{damaged} cannot be read .*set skip_bad to 1"):
        teach(root, tmp_path / "r")
    assert not (tmp_path / "r").exists()
    result = teach(root, tmp_path / "r", skip_bad=1)
    assert result.test.images == (7 if damaged.startswith("val") else 8)
    assert run.evaluate(tmp_path / "r") == result.test


def test_damage_that_headers_do_not_show_is_named_with_the_way_out(tmp_path: Path) -> None:
    root = folder(tmp_path / "d")
    path = root / "val" / "b" / "3.jpg"
    damage_inside(path)
    with pytest.raises(BadImageError, match=r"3\.jpg .*replace the file or raise skip_bad, and resume"):
        teach(root, tmp_path / "r")
    config = TeachConfig(
        "resnet8",
        out=tmp_path / "r",
        data=DataConfig("folder", root, size=16, validation=0.25, workers=0, loader="torch", skip_bad=1),
        optim=OptimConfig(epochs=1, batch_size=4),
        log=LogConfig(tensorboard=False, progress=False),
    )
    assert run.teach(config, resume=True).test.images == 7  # skip_bad may be raised
    Image.new("RGB", (32, 32)).save(path)
    assert run.evaluate(tmp_path / "r").images == 8
