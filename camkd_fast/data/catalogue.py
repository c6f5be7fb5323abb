"""Data sets by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from .cifar import load_cifar10, load_cifar100
from .digits import VALIDATION, load_digits
from .fashion_mnist import load_fashion_mnist
from .fetch import default_folder
from .files import ImageFiles
from .folders import load_folder, load_stanford_dogs, load_tiny_imagenet
from .images import LabelledImages
from .splits import Splits, hold_out

ARRAYS: dict[str, Callable[[Path | None], tuple[LabelledImages, LabelledImages]]] = {
    "fashion-mnist": load_fashion_mnist,
    "cifar10": lambda root: load_cifar10(root or default_folder("cifar10")),
    "cifar100": lambda root: load_cifar100(root or default_folder("cifar100")),
}
FILES: dict[str, Callable[[Path, int], tuple[ImageFiles, ImageFiles]]] = {
    "tiny-imagenet": load_tiny_imagenet,
    "stanford-dogs": load_stanford_dogs,
}
# Default side of the images, pixels.
SIZES = {"tiny-imagenet": 64, "stanford-dogs": 224, "folder": 224}
NAMES: tuple[str, ...] = ("digits", *ARRAYS, *FILES, "folder")


def load(
    name: str, root: Path | None = None, *, split_seed: int = 0, validation: float = 0.1, size: int | None = None
) -> Splits:
    """Load the training, validation and test splits of a data set.

    The validation split is a stratified part of the published training images. The test split is the published one.

    Args:
        name: one of `NAMES`. "digits" has splits of 900, 300 and 597 images, all chosen by `split_seed`.
        root: the folder of the files, `fetch.default_folder(name)` if None; required for "folder".
        split_seed: chooses the images of the validation split.
        validation: fraction of the training images in the validation split; 0 makes it empty.
        size: side of the images, pixels. Files are resized (None: 64 for "tiny-imagenet", else 224); arrays get a black
            border (None: no border).

    Raises:
        ValueError: the name is unknown (the message lists the nearest ones), the data set does not have an option, or
            its files are invalid (see the function that reads the set).
        FileNotFoundError: the files are missing.
    """
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=3, cutoff=0.4)
        hint = f" (nearest: {', '.join(near)})" if near else ""
        raise ValueError(f"the data set must be one of {', '.join(NAMES)}, got {name!r}{hint}")
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if name == "digits":
        if root is not None or validation != 0.1 or size is not None:
            raise ValueError(
                f"digits come with scikit-learn as 8x8 images, with {VALIDATION} validation images: "
                f"leave out root, validation and size, got {root}, {validation} and {size}"
            )
        return load_digits(split_seed)
    if name in ARRAYS:
        train, test = (part if size is None else part.padded(size) for part in ARRAYS[name](root))
        return Splits(*hold_out(train, validation, split_seed), test)
    side = size or SIZES[name]
    if name == "folder":
        if root is None:
            raise ValueError("data set 'folder' needs a root folder, got None")
        return load_folder(root, side, validation, split_seed)
    listed, test_files = FILES[name](root or default_folder(name), side)
    return Splits(*hold_out(listed, validation, split_seed), test_files)
