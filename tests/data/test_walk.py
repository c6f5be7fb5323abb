"""Which files of a class folder are read: those of torchvision's ImageFolder. What is left out is counted."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest

from camkd_fast.data import ImageFiles
from camkd_fast.data.folders import load_folder

# As in torchvision.datasets.folder, on which no test depends.
ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def image_folder(root: Path) -> tuple[list[str], list[tuple[str, int]]]:
    """Classes and samples of torchvision's ImageFolder, written after its documentation and source."""
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    samples = []
    for number, name in enumerate(classes):
        for folder, _, files in sorted(os.walk(root / name, followlinks=True)):
            samples += [
                (os.path.join(folder, file), number) for file in sorted(files) if file.lower().endswith(ENDINGS)
            ]
    return classes, samples


def put(path: Path, content: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def split(root: Path, *classes: str) -> Path:
    """A tree whose train part the test fills and whose val part is small."""
    for name in classes:
        put(root / "val" / name / "0.jpg")
        put(root / "train" / name / "0.jpg")
    return root / "train"


def loaded(root: Path) -> ImageFiles:
    train = load_folder(root, 32, validation=0.0).train
    assert isinstance(train, ImageFiles)
    return train


def test_the_files_and_the_order_of_image_folder(tmp_path: Path) -> None:
    train = split(tmp_path / "set", "a", "B", "c")
    for name in (
        *("b/1.jpg", "b-/1.jpg", "b/c/1.jpg", "10.jpg", "9.jpg", "x.JPEG", "y.Png", "z.tiff", "z.TIF", "q.webp"),
        *("p.ppm", "p.pgm", "w.bmp", ".hidden.jpg", "b/.inner/h.png", "two.words.jpg", "ünï.jpg", "folder.jpg/in.jpg"),
    ):
        put(train / "a" / name)
    other = put(tmp_path / "elsewhere" / "deep" / "1.jpg").parents[1]
    (train / "c" / "link").symlink_to(other, target_is_directory=True)
    (train / "c" / "file.jpg").symlink_to(put(tmp_path / "target"))
    (train / "c" / "dangling.jpg").symlink_to(tmp_path / "nothing")
    (train / "D").symlink_to(other, target_is_directory=True)  # a class
    classes, samples = image_folder(train)
    assert len(samples) == 3 + 18 + 3 + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is left out
        data = loaded(tmp_path / "set")
    assert list(data.class_names) == classes == ["B", "D", "a", "c"]
    assert list(zip(map(str, data.paths), data.labels.tolist(), strict=True)) == samples


def test_links_that_lead_back_are_not_followed(tmp_path: Path) -> None:
    train = split(tmp_path, "a", "b")
    put(train / "a" / "in" / "1.jpg")
    (train / "a" / "in" / "up").symlink_to(train / "a", target_is_directory=True)
    (train / "a" / "self").symlink_to(".", target_is_directory=True)
    (train / "b" / "all").symlink_to(train, target_is_directory=True)
    assert [str(path.relative_to(train)) for path in loaded(tmp_path).paths] == ["a/0.jpg", "a/in/1.jpg", "b/0.jpg"]


def test_a_link_to_another_drive_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_drive(paths: list[str]) -> str:
        raise ValueError("Paths don't have the same drive")

    train = split(tmp_path / "set", "a", "b")
    put(tmp_path / "other" / "1.jpg")
    (train / "a" / "more").symlink_to(tmp_path / "other", target_is_directory=True)
    monkeypatch.setattr("os.path.commonpath", other_drive)
    assert len(loaded(tmp_path / "set").paths) == 3


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["a/1.gif"], r"1 file is left out \(1 \.gif\)"),
        (["a/1.gif", "b/deep/2.GIF", "a/notes.txt"], r"3 files are left out \(2 \.gif, 1 \.txt\)"),
        (["a/README", "beside.jpg"], r"2 files are left out \(1 \.jpg, 1 without ending\)"),
        (["a/.DS_Store", "a/Thumbs.db"], r"2 files are left out \(1 \.db, 1 without ending\)"),
        (["a/notes.txt", ".empty/"], r"1 file is left out \(1 \.txt\)"),
        ([".ipynb_checkpoints/x/1.jpg", ".git/2"], r"2 files are left out \(2 in hidden folders\)"),
        ([f"a/1.{n}" for n in "abcdefg"], r"7 files are left out \(1 \.a, 1 \.b, 1 \.c, 1 \.d, 1 \.e, \.\.\.\)"),
    ],
)
def test_what_is_left_out_is_counted_and_said_once(tmp_path: Path, files: list[str], said: str) -> None:
    train = split(tmp_path, "a", "b")
    for name in files:
        (train / name).mkdir() if name.endswith("/") else put(train / name)
    with pytest.warns(UserWarning, match=said) as caught:
        assert len(loaded(tmp_path)) == 2
    assert len(caught) == 1 and ".webp" in str(caught[0].message)


def test_left_out_files_of_all_parts_are_one_warning(tmp_path: Path) -> None:
    split(tmp_path, "a", "b")
    for part in ("train", "val", "test"):
        put(tmp_path / part / "a" / "1.jpg")
        put(tmp_path / part / "a" / "1.heic")
    with pytest.warns(UserWarning, match=r"3 files are left out \(3 \.heic\)") as caught:
        load_folder(tmp_path, 32)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_folder(tmp_path, 32)  # as the report of a run does


def test_metadata_of_macos_is_no_image(tmp_path: Path) -> None:
    train = split(tmp_path, "a", "b")
    put(train / "a" / "._0.jpg", b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X")
    named = put(train / "b" / "._image.jpg")
    with pytest.warns(UserWarning, match=r"1 file is left out \(1 \._\* of macOS\)"):
        data = loaded(tmp_path)
    assert named in data.paths and len(data) == 3


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Removed while it is read: os.walk would leave it out silently. Permissions do not stop the superuser."""
    train = split(tmp_path, "a", "b")
    put(train / "a" / "in" / "1.jpg")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("/in"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="a/in"):
        load_folder(tmp_path, 32)


@pytest.mark.parametrize("hidden", [".cache", ".Trash-0", ".cache/deep"])
def test_a_hidden_folder_need_not_be_readable(tmp_path: Path, hidden: str, monkeypatch: pytest.MonkeyPatch) -> None:
    train = split(tmp_path, "a", "b")
    put(train / hidden / "1.jpg")
    put(train / ".ipynb_checkpoints" / "1.jpg")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith(hidden):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.warns(UserWarning, match=r"1 file is left out \(1 in hidden folders\)"):
        assert loaded(tmp_path).class_names == ("a", "b")


@pytest.mark.parametrize(
    ("folders", "said"),
    [
        ([], "has 0 class folders, at least 2"),
        (["a"], "has 1 class folder, at least 2"),
        (["a", ".cache"], r"has 1 class folder \(and 1 hidden, which is no class\), at least 2"),
        ([".cache", ".ipynb_checkpoints"], r"has 0 class folders \(and 2 hidden, which are no classes\), at least 2"),
    ],
)
def test_hidden_folders_are_named_where_classes_are_missing(tmp_path: Path, folders: list[str], said: str) -> None:
    for name in folders:
        put(tmp_path / name / "1.jpg")
    with pytest.raises(ValueError, match=said):
        load_folder(tmp_path, 32)


def test_a_class_with_no_image_is_refused(tmp_path: Path) -> None:
    train = split(tmp_path, "a", "b")
    put(train / "c" / "x.gif")
    with pytest.raises(ValueError, match="c holds no image file"):
        load_folder(tmp_path, 32)
