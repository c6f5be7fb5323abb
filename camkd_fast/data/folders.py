"""Data sets of image files: any class-per-folder tree, Tiny-ImageNet and Stanford Dogs in their published layouts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from .files import IMAGENET_MEAN, IMAGENET_STD, ImageFiles
from .splits import Splits, hold_out

EXTENSIONS = (".jpg", ".jpeg", ".png")  # in any case
# Over the training set, in pixel levels, as commonly published for Tiny-ImageNet.
TINY_MEAN = (0.4802 * 255, 0.4481 * 255, 0.3975 * 255)
TINY_STD = (0.2770 * 255, 0.2691 * 255, 0.2821 * 255)
TEST_SHARE = 0.2  # of a tree without a test part


def load_folder(root: Path, size: int, validation: float = 0.1, split_seed: int = 0) -> Splits:
    """A tree ROOT/train/CLASS/IMAGE with ROOT/val, ROOT/test or both beside train, or a flat one ROOT/CLASS/IMAGE.

    Classes are the folders in sorted order; JPEG and PNG files count, hidden files and folders do not. A single folder
    beside train is the test part, as in ImageNet, and the validation part is held out of train. Of a flat tree a fifth
    is the test part, the same for every seed: a teacher of another seed must not have been trained on it.

    Args:
        size: side of the delivered images, pixels.
        validation: share of the training images to hold out; with both val and test there it has no effect.

    Raises:
        FileNotFoundError: the folder is missing, or train has neither val nor test beside it.
        ValueError: fewer than two classes, a class folder without an image, a class that train does not have.
    """
    if not (root / "train").is_dir() or not _visible_folders(root / "train"):  # "train" may also be a class
        train, test = hold_out(_read_tree(root, size), TEST_SHARE, seed=0)
        return Splits(*hold_out(train, validation, split_seed), test)
    train = _read_tree(root / "train", size)
    others = [_read_tree(root / part, size, train.class_names) for part in ("val", "test") if (root / part).is_dir()]
    if not others:
        raise FileNotFoundError(f"{root} has a folder train, but neither val nor test")
    return Splits(train, *others) if len(others) == 2 else Splits(*hold_out(train, validation, split_seed), others[0])


def load_tiny_imagenet(root: Path, size: int = 64) -> tuple[ImageFiles, ImageFiles]:
    """The training part and the labelled validation part, which serves as test part: the published one has no labels.

    Args:
        root: the extracted folder tiny-imagenet-200, or its parent.

    Raises:
        FileNotFoundError: a part of the layout or an annotated image is missing.
        ValueError: a class folder without an image, an annotation of an unknown class.
    """
    root = root if (root / "train").is_dir() else root / "tiny-imagenet-200"
    folders = class_folders(root / "train")
    names = [folder.name for folder in folders]
    train = [(folder.name, image) for folder in folders for image in images_in(folder / "images")]
    annotations = root / "val" / "val_annotations.txt"
    if not annotations.is_file():
        raise FileNotFoundError(f"{annotations} is missing")
    # val_0.JPEG, class and box, separated by tabs.
    rows = [line.split("\t") for line in annotations.read_text().splitlines()]
    test = [(row[1] if len(row) > 1 else "", root / "val" / "images" / row[0]) for row in rows]
    return (
        _image_files(train, names, size, TINY_MEAN, TINY_STD),
        _image_files(_checked(test, names, annotations), names, size, TINY_MEAN, TINY_STD),
    )


def load_stanford_dogs(root: Path, size: int = 224) -> tuple[ImageFiles, ImageFiles]:
    """The 12,000 training and 8,580 test images of 120 breeds, in the order of their lists. Needs scipy.

    Args:
        root: the folder into which images.tar (Images/CLASS/FILE.jpg) and lists.tar were extracted; the lists
            train_list.mat and test_list.mat may also be in ROOT/lists.

    Raises:
        FileNotFoundError: a list, the folder Images or a listed image is missing.
        ValueError: an unreadable list, a class folder without an image, a listed file of no class.
    """
    folders = class_folders(root / "Images")
    for folder in folders:
        images_in(folder)
    names = [folder.name for folder in folders]
    train, test = (
        _image_files(_read_list(root, f"{part}_list.mat", names), names, size, IMAGENET_MEAN, IMAGENET_STD)
        for part in ("train", "test")
    )
    return train, test


def class_folders(root: Path, least: int = 2) -> list[Path]:
    """The folders in `root` that are not hidden, sorted by name.

    Raises:
        FileNotFoundError: there is no folder `root`.
        ValueError: it holds fewer than `least` folders.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    folders = _visible_folders(root)
    if len(folders) < least:
        raise ValueError(f"{root} has {len(folders)} class folders, at least {least} must be there")
    return folders


def images_in(folder: Path) -> list[Path]:
    """The JPEG and PNG files in a folder that are not hidden, sorted by name.

    Raises:
        ValueError: there is none.
    """
    inside = folder.iterdir() if folder.is_dir() else ()
    images = sorted(path for path in inside if path.suffix.lower() in EXTENSIONS and not path.name.startswith("."))
    if not images:
        raise ValueError(f"{folder} holds no JPEG or PNG file")
    return images


def _visible_folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _read_tree(root: Path, size: int, names: Sequence[str] | None = None) -> ImageFiles:
    """ROOT/CLASS/IMAGE. With `names` the classes are those, of which some may be missing here."""
    folders = class_folders(root, least=1 if names else 2)
    found = [folder.name for folder in folders]
    if names and (unknown := sorted(set(found) - set(names))):
        raise ValueError(f"{root} has a class {unknown[0]} that is not among the {len(names)} of the training images")
    pairs = [(folder.name, image) for folder in folders for image in images_in(folder)]
    return _image_files(pairs, names or found, size, IMAGENET_MEAN, IMAGENET_STD)


def _read_list(root: Path, name: str, names: Sequence[str]) -> list[tuple[str, Path]]:
    """Pairs of class and file out of a list of Stanford Dogs."""
    from scipy.io import loadmat

    path = root / name if (root / name).is_file() else root / "lists" / name
    if not path.is_file():
        raise FileNotFoundError(f"{name} is neither in {root} nor in {root / 'lists'}")
    try:
        files = [str(cell.item()) for cell in loadmat(path)["file_list"].ravel()]
    except Exception as error:  # a damaged file raises nearly anything
        raise ValueError(f"{path} is no readable list: {error}") from error
    return _checked([(file.split("/")[0], root / "Images" / file) for file in files], names, path)


def _checked(pairs: list[tuple[str, Path]], names: Sequence[str], source: Path) -> list[tuple[str, Path]]:
    """The pairs of class and file that `source` lists, if the classes are known and the files are there."""
    known = set(names)
    for name, path in pairs:
        if name not in known:
            raise ValueError(f"{source}: {path.name} is of class {name!r}, which is not among the {len(names)} classes")
    if missing := [path for _, path in pairs if not path.is_file()]:
        raise FileNotFoundError(f"{source} lists {missing[0]}, which is missing ({len(missing)} of {len(pairs)} are)")
    return pairs


def _image_files(
    pairs: list[tuple[str, Path]],
    names: Sequence[str],
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> ImageFiles:
    number = {name: i for i, name in enumerate(names)}
    labels = torch.tensor([number[name] for name, _ in pairs], dtype=torch.int64)
    return ImageFiles(tuple(path for _, path in pairs), labels, len(names), tuple(names), mean, std, size)
