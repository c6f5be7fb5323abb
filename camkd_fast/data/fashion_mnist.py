"""Fashion-MNIST: 60,000 + 10,000 grey images of 28x28 pixels in 10 classes, from its four gzipped IDX files."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from .fetch import SOURCES, default_folder
from .images import LabelledImages, check_labels

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
FILES = tuple(file.name for file in SOURCES["fashion-mnist"].files)
NAMES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
NUM_CLASSES = len(NAMES)
# Statistics of the 60,000 training images, in pixel levels.
MEAN, STD = (72.94035,), (90.02118,)


def load_fashion_mnist(root: Path | None = None) -> tuple[LabelledImages, LabelledImages]:
    """Load the training and test images, pixels (N, 1, 28, 28).

    Args:
        root: the folder of the four files. None: `default_folder("fashion-mnist")`, or the folder of Debian's package
            dataset-fashion-mnist.

    Raises:
        FileNotFoundError: no folder has all four files.
        ValueError: a file is truncated or damaged, or its contents do not match its name.
    """
    folders = [root] if root else [default_folder("fashion-mnist"), DEBIAN]
    for folder in folders:
        if all((folder / name).is_file() for name in FILES):
            return _part(folder, "train"), _part(folder, "t10k")
    missing = next(name for name in FILES if not (folders[-1] / name).is_file())
    raise FileNotFoundError(
        f"{missing} is not in {' or '.join(map(str, folders))}: "
        "get it with `apt-get install dataset-fashion-mnist` or `camkd-fast data fetch fashion-mnist`"
    )


def _part(folder: Path, part: str) -> LabelledImages:
    images, labels = folder / f"{part}-images-idx3-ubyte.gz", folder / f"{part}-labels-idx1-ubyte.gz"
    pixels, classes = read_idx(images, 3), read_idx(labels, 1).long()
    if len(pixels) != len(classes):
        raise ValueError(f"{images} holds {len(pixels)} images, {labels} holds {len(classes)} labels")
    check_labels(classes, NUM_CLASSES, labels)
    return LabelledImages(pixels.unsqueeze(1), classes, NUM_CLASSES, MEAN, STD, NAMES)


def read_idx(path: Path, dims: int) -> Tensor:
    """Read a gzipped IDX file of unsigned bytes into a uint8 tensor with `dims` dimensions.

    The header is big-endian: 0, 0, 8 for unsigned bytes, the number of dimensions, then each size in 4 bytes.

    Raises:
        ValueError: the header has another type or number of dimensions, the number of values does not match it, or the
            gzip data is damaged.
    """
    header, content = bytearray(), bytearray()
    try:
        with gzip.open(path) as file:
            _fill(header, file, 4 + 4 * dims)
            if len(header) == 4 + 4 * dims:
                # One byte more than expected, to detect trailing data.
                _fill(content, file, math.prod(struct.unpack(f">{dims}I", header[4:])) + 1)
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    magic = bytes((0, 0, 8, dims))
    if header[:4] != magic:
        raise ValueError(f"{path} begins with {header[:4].hex()}, an IDX file of {dims} dimensions with {magic.hex()}")
    if len(header) < 4 + 4 * dims:
        raise ValueError(f"{path} ends after {len(header)} of {4 + 4 * dims} bytes of its header")
    shape = struct.unpack(f">{dims}I", header[4:])
    count = math.prod(shape)
    if len(content) != count:
        found = f"more than {count}" if len(content) > count else str(len(content))
        raise ValueError(f"{path} holds {found} values, its header says {'x'.join(map(str, shape))} = {count}")
    return torch.frombuffer(content, dtype=torch.uint8).view(shape) if count else torch.empty(shape, dtype=torch.uint8)


def _fill(buffer: bytearray, file: gzip.GzipFile, size: int) -> None:
    """Read until the buffer has `size` bytes or the file ends, even if it is truncated."""
    with suppress(EOFError):  # the caller checks the buffer's size
        while chunk := file.read(min(size - len(buffer), 1 << 20)):
            buffer += chunk
