"""Trees of image files in every supported layout. Nothing is decoded, so the files need not be images."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from camkd_fast.data import ImageFiles, catalogue
from camkd_fast.data.fetch import default_folder
from camkd_fast.data.folders import load_folder, load_stanford_dogs, load_tiny_imagenet

pytestmark = pytest.mark.usefixtures("own_data_folder")


def image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(str(path.relative_to(path.parents[2])).encode())
    return path


def tree(root: Path, classes: tuple[str, ...], count: int) -> Path:
    for name in classes:
        for n in range(count):
            image(root / name / f"{n:03}{('.jpg', '.JPEG', '.png')[n % 3]}")
    return root


def names(data: ImageFiles) -> list[tuple[str, str]]:
    return [(path.parent.name, data.class_names[label]) for path, label in zip(data.paths, data.labels, strict=True)]


def test_a_flat_tree_has_the_same_test_split_for_every_seed(tmp_path: Path) -> None:
    tree(tmp_path, ("cat", "ant", "Bee"), 20)
    image(tmp_path / ".cache" / "x.jpg")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "labels.csv").write_text("no folder")
    with pytest.warns(UserWarning, match=r"3 files are left out \(1 \.csv, 1 \.txt, 1 in hidden folders\)"):
        splits, other = (catalogue.load("folder", tmp_path, split_seed=seed, size=48) for seed in (0, 1))
    assert [len(part) for part in splits] == [43, 5, 12]
    assert splits.train.shape == (3, 48, 48) and splits.train.channels == 3
    everything: set[Path] = set()
    for part in splits:
        assert isinstance(part, ImageFiles) and part.class_names == ("Bee", "ant", "cat") and part.num_classes == 3
        assert all(folder == name for folder, name in names(part))
        everything |= set(part.paths)
    assert len(everything) == 60
    assert splits.test.labels.bincount().tolist() == [4, 4, 4]
    assert other.test.paths == splits.test.paths and other.validation.paths != splits.validation.paths


@pytest.mark.parametrize("part", ["val", "test"])
def test_val_or_test_by_itself_is_the_test_split(tmp_path: Path, part: str) -> None:
    tree(tmp_path / "train", ("a", "b"), 10)
    tree(tmp_path / part, ("b",), 3)
    splits = load_folder(tmp_path, size=32)
    assert [len(p) for p in splits] == [18, 2, 3]
    assert splits.test.labels.tolist() == [1, 1, 1] and splits.test.num_classes == 2


def test_train_val_and_test_folders_are_the_splits(tmp_path: Path) -> None:
    for part, count in (("train", 4), ("val", 3), ("test", 2)):
        tree(tmp_path / part, ("a", "b"), count)
    splits = load_folder(tmp_path, size=32)
    assert [len(part) for part in splits] == [8, 6, 4]
    assert {path.parents[1].name for path in splits.validation.paths} == {"val"}


@pytest.mark.parametrize(
    "spelled",
    [
        ("Training", "Testing"), ("Train", "Test"), ("TRAIN", "TEST"), ("train", "valid"), ("train", "validation"),
        ("Train", "Val"), ("training", "Valid"), ("Train", "Validation", "Test"), ("train", "VAL", "Testing"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("beside", [False, True], ids=["", "beside another folder"])
def test_folders_of_parts_may_be_spelled_otherwise(tmp_path: Path, spelled: tuple[str, ...], beside: bool) -> None:
    for count, part in zip((10, 3, 2), spelled, strict=False):
        tree(tmp_path / part, ("a", "b"), count)
    if beside:
        tree(tmp_path / "masks", ("x", "y"), 2)
    splits = load_folder(tmp_path, size=32)
    assert [len(p) for p in splits] == ([20, 6, 4] if len(spelled) == 3 else [18, 2, 6])
    assert all(part.class_names == ("a", "b") for part in splits)
    assert {path.parents[1].name for path in splits.train.paths} == {spelled[0]}


def test_a_plain_name_is_the_part_whatever_is_beside_it(tmp_path: Path) -> None:
    for folder in ("train", "val", "test"):
        tree(tmp_path / folder, ("a", "b"), 3)
    plain = load_folder(tmp_path, size=32)
    for folder in ("Training", "valid", "testing"):
        tree(tmp_path / folder, ("old",), 1)
    for one, other in zip(plain, load_folder(tmp_path, size=32), strict=True):
        assert one.paths == other.paths


@pytest.mark.parametrize(
    "folders", [("Train", "Training", "test"), ("Train", "Valid", "Validation"), ("Training", "Test", "testing")]
)
def test_two_folders_of_one_part_are_refused(tmp_path: Path, folders: tuple[str, ...]) -> None:
    for folder in folders:
        tree(tmp_path / folder, ("a", "b"), 3)
    with pytest.raises(ValueError, match=r" and .*, which may both be the (train|val|test) part"):
        load_folder(tmp_path, size=32)


def test_parts_without_training_images_are_refused(tmp_path: Path) -> None:
    for folder in ("Testing", "Validation"):
        tree(tmp_path / folder, ("a", "b"), 3)
    with pytest.raises(FileNotFoundError, match="has Validation and Testing, but no folder train"):
        load_folder(tmp_path, size=32)
    shutil.rmtree(tmp_path / "Testing")
    (tmp_path / "Validation").rename(tmp_path / "Training")
    with pytest.raises(FileNotFoundError, match="has a folder Training, but neither val nor test"):
        load_folder(tmp_path, size=32)


def test_classes_may_be_called_as_parts(tmp_path: Path) -> None:
    """Activities, for instance, with a folder per person in each."""
    for activity in ("training", "testing", "meeting"):
        tree(tmp_path / activity, (f"{activity} 1", f"{activity} 2"), 5)
    assert load_folder(tmp_path, size=32).train.class_names == ("meeting", "testing", "training")


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    tree(tmp_path, ("train", "plane"), 10)
    assert load_folder(tmp_path, size=32).train.class_names == ("plane", "train")


def test_invalid_trees_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        load_folder(tmp_path / "nowhere", size=32)
    with pytest.raises(ValueError, match="has 0 class folders, at least 2"):
        load_folder(tmp_path, size=32)
    tree(tmp_path, ("cat", "dog"), 10)
    empty = tmp_path / "eel"
    empty.mkdir()
    image(empty / "png")
    with pytest.raises(ValueError, match="eel holds no image file"):
        load_folder(tmp_path, size=32)
    shutil.rmtree(empty)
    load_folder(tmp_path, size=32)
    tree(tmp_path / "train", ("cat", "dog"), 10)
    with pytest.raises(FileNotFoundError, match="folder train, but neither val nor test"):
        load_folder(tmp_path, size=32)
    tree(tmp_path / "test", ("cat", "cow"), 10)
    with pytest.raises(ValueError, match="test has a class cow that is not among the 2"):
        load_folder(tmp_path, size=32)


def tiny_imagenet(root: Path, classes: tuple[str, ...] = ("n02", "n01", "n03"), count: int = 5) -> Path:
    for name in classes:
        for n in range(count):
            image(root / "train" / name / "images" / f"{name}_{n}.JPEG")
        (root / "train" / name / f"{name}_boxes.txt").write_text("boxes")
    lines = []
    for n, name in enumerate(classes):
        image(root / "val" / "images" / f"val_{n}.JPEG")
        lines.append(f"val_{n}.JPEG\t{name}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    image(root / "test" / "images" / "test_0.JPEG")
    (root / "wnids.txt").write_text("\n".join(classes))
    return root


def test_tiny_imagenet_uses_its_labelled_validation_images_for_testing(tmp_path: Path) -> None:
    tiny_imagenet(default_folder("tiny-imagenet") / "tiny-imagenet-200")
    splits = catalogue.load("tiny-imagenet", validation=0.2)
    assert [len(part) for part in splits] == [12, 3, 3]
    assert splits.train.class_names == ("n01", "n02", "n03") and splits.train.shape == (3, 64, 64)
    assert splits.test.labels.tolist() == [1, 0, 2]
    assert all(
        path.parts[-3] == name for path, name in zip(splits.train.paths, _class_names(splits.train), strict=True)
    )
    assert splits.train.mean == splits.test.mean


def _class_names(data: ImageFiles) -> list[str]:
    return [data.class_names[label] for label in data.labels]


def test_invalid_tiny_imagenet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*tiny-imagenet-200/train"):
        load_tiny_imagenet(tmp_path, 64)
    annotations = tiny_imagenet(tmp_path) / "val" / "val_annotations.txt"
    text = annotations.read_text()
    annotations.write_text(text + "val_9.JPEG\tn01\t0\t0\t1\t1\n")
    with pytest.raises(FileNotFoundError, match=r"lists .*val_9\.JPEG, which is missing \(1 of 4"):
        load_tiny_imagenet(tmp_path, 64)
    annotations.write_text(text.replace("n03", "n04"))
    with pytest.raises(ValueError, match=r"val_2\.JPEG is of class 'n04', which is not among the 3"):
        load_tiny_imagenet(tmp_path, 64)
    annotations.write_text(text + "val_0.JPEG")
    with pytest.raises(ValueError, match=r"val_0\.JPEG is of class ''"):
        load_tiny_imagenet(tmp_path, 64)
    annotations.unlink()
    with pytest.raises(FileNotFoundError, match=r"val_annotations\.txt is missing"):
        load_tiny_imagenet(tmp_path, 64)
    shutil.rmtree(tmp_path / "train" / "n02" / "images")
    with pytest.raises(ValueError, match=r"n02/images holds no image file"):
        load_tiny_imagenet(tmp_path, 64)


DOGS = ("n02085620-Chihuahua", "n02085782-Japanese_spaniel")


def stanford_dogs(root: Path, lists: Path) -> Path:
    from scipy.io import savemat

    lists.mkdir(parents=True, exist_ok=True)
    for part, numbers in (("train", range(3)), ("test", range(3, 5))):
        files = [f"{name}/{name}_{n}.jpg" for name in DOGS for n in numbers]
        for file in files:
            image(root / "Images" / file)
        cells = np.empty((len(files), 1), dtype=object)
        cells[:, 0] = files
        labels = np.array([[1 + DOGS.index(file.split("/")[0])] for file in files], dtype=np.uint8)
        savemat(lists / f"{part}_list.mat", {"file_list": cells, "annotation_list": cells, "labels": labels})
    return root


@pytest.mark.parametrize("inside", [".", "lists"])
def test_stanford_dogs_follow_their_lists(tmp_path: Path, inside: str) -> None:
    pytest.importorskip("scipy")
    train, test = load_stanford_dogs(stanford_dogs(tmp_path, tmp_path / inside), 224)
    assert train.class_names == DOGS and train.shape == (3, 224, 224)
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1] and test.labels.tolist() == [0, 0, 1, 1]
    assert [path.name for path in test.paths[:2]] == [f"{DOGS[0]}_3.jpg", f"{DOGS[0]}_4.jpg"]
    splits = catalogue.load("stanford-dogs", tmp_path, validation=1 / 3, size=96)
    assert [len(part) for part in splits] == [4, 2, 4] and splits.test.shape == (3, 96, 96)


def test_invalid_stanford_dogs_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*Images"):
        load_stanford_dogs(tmp_path, 224)
    stanford_dogs(tmp_path, tmp_path)
    image_file = tmp_path / "Images" / DOGS[0] / f"{DOGS[0]}_0.jpg"
    image_file.unlink()
    with pytest.raises(FileNotFoundError, match=r"train_list\.mat lists .*_0\.jpg, which is missing \(1 of 6"):
        load_stanford_dogs(tmp_path, 224)
    image(image_file)
    path = tmp_path / "test_list.mat"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"test_list\.mat is not a readable list"):
        load_stanford_dogs(tmp_path, 224)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"test_list\.mat is neither in"):
        load_stanford_dogs(tmp_path, 224)
    (tmp_path / "Images" / "n03-empty").mkdir()
    with pytest.raises(ValueError, match="n03-empty holds no image file"):
        load_stanford_dogs(tmp_path, 224)


def test_fingerprints_of_files_depend_on_contents_and_not_on_paths(tmp_path: Path) -> None:
    here = load_folder(tree(tmp_path / "a" / "set", ("x", "y"), 10), size=32)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    there = load_folder(tmp_path / "b" / "set", size=32)
    assert here.train.fingerprint() == there.train.fingerprint()
    assert here.train.fingerprint() != load_folder(tmp_path / "a" / "set", size=33).train.fingerprint()
    assert here.train.fingerprint() != here.train.take(torch.arange(len(here.train)).flip(0)).fingerprint()
    there.train.paths[0].write_bytes(b"changed")
    changed = load_folder(tmp_path / "b" / "set", size=32)
    assert changed.train.fingerprint() != here.train.fingerprint()
    assert there.train.fingerprint() == here.train.fingerprint()  # computed once
    assert there.train.take(torch.tensor([0])).paths == there.train.paths[:1]
