"""Data sets of image files: any class-per-folder tree, Tiny-ImageNet and Stanford Dogs in their published layouts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from ..system import utf8_text
from .files import IMAGENET_MEAN, IMAGENET_STD, ImageFiles
from .splits import Splits, hold_out
from .walk import count_files, image_names, warn_left_out

# Commonly published statistics of Tiny-ImageNet's training set, in pixel levels.
TINY_MEAN = (0.4802 * 255, 0.4481 * 255, 0.3975 * 255)
TINY_STD = (0.2770 * 255, 0.2691 * 255, 0.2821 * 255)
TEST_FRACTION = 0.2  # of a flat tree
# Names of the folder of each part, in upper or lower case.
_PARTS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


def load_folder(root: Path, size: int, validation: float = 0.1, split_seed: int = 0) -> Splits:
    """Load ROOT/train/CLASS/IMAGE with ROOT/val, ROOT/test or both, or a flat tree ROOT/CLASS/IMAGE.

    The three folders may also be called Training, Valid or Validation, and Testing, in upper or lower case.

    Classes are the folders in sorted order, without hidden ones. Of a class the same files are read in the same order
    as by torchvision's ImageFolder: folders inside it and links to folders are followed, and a name must end with one
    of `walk.EXTENSIONS`. A warning counts the files that are left out. If only one of val and test exists, it is the
    test split, as in ImageNet, and the validation split is held out of train. One fifth of a flat tree is the test
    split, the same for every seed, so that no teacher is trained on it.

    Args:
        size: side of the images, pixels.
        validation: fraction of the training images to hold out; ignored if both val and test exist.

    Raises:
        FileNotFoundError: the folder is missing, or it has train but neither val nor test, or only these.
        ValueError: there are fewer than two classes, a class folder has no image, train lacks a class, or two folders
            may be the same part.
        OSError: a folder cannot be read.
    """
    left_out: Counter[str] = Counter()
    splits = _load_splits(root, size, validation, split_seed, left_out)
    warn_left_out(root, left_out)
    return splits


def _load_splits(root: Path, size: int, validation: float, split_seed: int, left_out: Counter[str]) -> Splits:
    """`load_folder`, which counts the files that are left out by ending."""
    parts = _part_folders(root)
    if not parts:
        train, test = hold_out(_read_tree(root, size, left_out), TEST_FRACTION, seed=0)
        return Splits(*hold_out(train, validation, split_seed), test)
    train = _read_tree(parts["train"], size, left_out)
    others = [_read_tree(parts[part], size, left_out, train.class_names) for part in ("val", "test") if part in parts]
    if not others:
        raise FileNotFoundError(f"{root} has a folder {parts['train'].name}, but neither val nor test")
    return Splits(train, *others) if len(others) == 2 else Splits(*hold_out(train, validation, split_seed), others[0])


def _part_folders(root: Path) -> dict[str, Path]:
    """The folder of each part, "train" among them; none of a flat tree, which may have classes of these names.

    A folder is that of the training images if it has class folders, and is called train, stands beside parts only, or
    shares a class with another part.

    Raises:
        FileNotFoundError: all folders are parts, but none is train.
        ValueError: two folders may be the same part, and none is called train, val or test.
    """
    folders = _visible_folders(root) if root.is_dir() else []
    named = {part: [path for path in folders if path.name.lower() in names] for part, names in _PARTS.items()}
    parts = [path for paths in named.values() for path in paths]
    classes = {path: {inner.name for inner in _visible_folders(path)} for path in parts}
    train = [path for path in named["train"] if classes[path]]  # without folders inside, train is a class
    only_parts = len(parts) == len(folders)
    if not train:
        if only_parts and any(classes.values()):
            found = " and ".join(path.name for path in parts)
            raise FileNotFoundError(f"{root} has {found}, but no folder train with a folder of images per class")
        return {}
    shared = any(classes[train[0]] & classes[path] for part in ("val", "test") for path in named[part])
    if train[0].name != "train" and not only_parts and not shared:
        return {}
    for part, paths in named.items():
        if exact := [path for path in paths if path.name == part]:
            named[part] = exact
        elif len(paths) > 1:
            both = " and ".join(path.name for path in paths)
            raise ValueError(f"{root} has {both}, which may both be the {part} part: rename or move all but one")
    return {part: paths[0] for part, paths in named.items() if paths}


def load_tiny_imagenet(root: Path, size: int) -> tuple[ImageFiles, ImageFiles]:
    """Load the training images, and the validation images as test split: the published test images have no labels.

    Args:
        root: the extracted folder tiny-imagenet-200, or its parent.
        size: side of the images, pixels.

    Raises:
        FileNotFoundError: a folder, the annotations or an annotated image is missing.
        ValueError: a class folder has no image, or an annotation has an unknown class.
    """
    root = root if (root / "train").is_dir() else root / "tiny-imagenet-200"
    folders = class_folders(root / "train")
    names = [folder.name for folder in folders]
    train = [(folder.name, image) for folder in folders for image in images_in(folder / "images")]
    annotations = root / "val" / "val_annotations.txt"
    if not annotations.is_file():
        raise FileNotFoundError(f"{annotations} is missing")
    # File name, class and box, separated by tabs.
    rows = [line.split("\t") for line in utf8_text(annotations).splitlines()]
    test = [(row[1] if len(row) > 1 else "", root / "val" / "images" / row[0]) for row in rows]
    return (
        _image_files(train, names, size, TINY_MEAN, TINY_STD),
        _image_files(_checked(test, names, annotations), names, size, TINY_MEAN, TINY_STD),
    )


def load_stanford_dogs(root: Path, size: int) -> tuple[ImageFiles, ImageFiles]:
    """Load the 12,000 training and 8,580 test images of 120 breeds, in the order of their lists. Requires scipy.

    Args:
        root: the folder with the contents of images.tar (Images/CLASS/FILE.jpg) and lists.tar; train_list.mat and
            test_list.mat may also be in ROOT/lists.
        size: side of the images, pixels.

    Raises:
        FileNotFoundError: a list, the folder Images or a listed image is missing.
        ValueError: a list is unreadable, a class folder has no image, or a listed file has an unknown class.
    """
    folders = class_folders(root / "Images")
    for folder in folders:
        images_in(folder)  # raises if there is none
    names = [folder.name for folder in folders]
    train, test = (
        _image_files(_read_list(root, f"{part}_list.mat", names), names, size, IMAGENET_MEAN, IMAGENET_STD)
        for part in ("train", "test")
    )
    return train, test


def class_folders(root: Path, minimum: int = 2) -> list[Path]:
    """The folders in `root` that are not hidden, sorted by name.

    Raises:
        FileNotFoundError: `root` is not a folder.
        ValueError: it has fewer than `minimum` folders.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    folders = _visible_folders(root)
    if len(folders) < minimum:
        hidden = sum(path.is_dir() for path in root.glob(".*"))
        besides = f" (and {hidden} hidden, which {'are no classes' if hidden > 1 else 'is no class'})" if hidden else ""
        number = f"{len(folders)} class folder{'s' * (len(folders) != 1)}"
        raise ValueError(f"{root} has {number}{besides}, at least {minimum} are required")
    return folders


def images_in(folder: Path, left_out: Counter[str] | None = None) -> list[Path]:
    """The image files in a folder and in the folders inside it, in the order of torchvision's ImageFolder.

    Args:
        left_out: counts the endings of all other files.

    Raises:
        ValueError: there is none.
        OSError: a folder inside cannot be read.
    """
    images = image_names(folder, Counter() if left_out is None else left_out) if folder.is_dir() else []
    if not images:
        raise ValueError(f"{folder} holds no image file")
    return [Path(name) for name in images]


def _visible_folders(root: Path) -> list[Path]:
    folders = (path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    return sorted(folders, key=lambda path: path.name)  # paths themselves compare without case on Windows


def _read_tree(root: Path, size: int, left_out: Counter[str], names: Sequence[str] | None = None) -> ImageFiles:
    """Read ROOT/CLASS/IMAGE. `names` are the classes if given; some may be missing here."""
    folders = class_folders(root, minimum=1 if names else 2)
    found = [folder.name for folder in folders]
    if names and (unknown := sorted(set(found) - set(names))):
        raise ValueError(f"{root} has a class {unknown[0]} that is not among the {len(names)} training classes")
    pairs = [(folder.name, image) for folder in folders for image in images_in(folder, left_out)]
    count_files(root, folders, left_out)
    return _image_files(pairs, names or found, size, IMAGENET_MEAN, IMAGENET_STD)


def _read_list(root: Path, name: str, names: Sequence[str]) -> list[tuple[str, Path]]:
    """Pairs (class, file) from a list of Stanford Dogs."""
    from scipy.io import loadmat

    path = root / name if (root / name).is_file() else root / "lists" / name
    if not path.is_file():
        raise FileNotFoundError(f"{name} is neither in {root} nor in {root / 'lists'}")
    try:
        files = [str(cell.item()) for cell in loadmat(path)["file_list"].ravel()]
    except Exception as error:  # a damaged file can raise almost anything
        raise ValueError(f"{path} is not a readable list: {error}") from error
    return _checked([(file.split("/")[0], root / "Images" / file) for file in files], names, path)


def _checked(pairs: list[tuple[str, Path]], names: Sequence[str], source: Path) -> list[tuple[str, Path]]:
    """Return `pairs` (class, file) from `source` after checking that the classes and the files exist."""
    classes = set(names)
    for name, path in pairs:
        if name not in classes:
            raise ValueError(f"{source}: {path.name} is of class {name!r}, which is not among the {len(names)} classes")
    if missing := [path for _, path in pairs if not path.is_file()]:
        raise FileNotFoundError(f"{source} lists {missing[0]}, which is missing ({len(missing)} of {len(pairs)})")
    return pairs


def _image_files(
    pairs: list[tuple[str, Path]],
    names: Sequence[str],
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> ImageFiles:
    label_of = {name: i for i, name in enumerate(names)}
    labels = torch.tensor([label_of[name] for name, _ in pairs], dtype=torch.int64)
    return ImageFiles(tuple(path for _, path in pairs), labels, len(names), tuple(names), mean, std, size)
