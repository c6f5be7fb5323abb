"""Image files read by Pillow: their size from the header alone, or the pixels of one window, resized."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from .augment import Integers

Levels = NDArray[np.uint8]

_JPEG_END = b"\xff\xd9"
_TAIL = 4096  # bytes at the end of a file in which its end marker is looked for: some cameras append a few


def image_size(path: Path) -> tuple[int, int]:
    """Height and width without decoding. A JPEG without its end marker is decoded, to know whether it is cut off.

    Raises:
        ValueError: no image, or a truncated one; says why, without the path.
    """
    try:
        with path.open("rb") as file, Image.open(file) as image:
            width, height = image.size
            if image.format == "JPEG":
                file.seek(-min(_TAIL, os.fstat(file.fileno()).st_size), os.SEEK_END)
                if _JPEG_END not in file.read():
                    file.seek(0)
                    image.load()
    except Exception as error:  # Pillow raises whatever its parsers stumble over
        raise ValueError(_reason(error)) from error
    return height, width


def open_rgb(path: Path) -> Image.Image:
    """The whole image as RGB, its orientation tag not applied.

    Raises:
        ValueError: the file cannot be decoded; says why, without the path.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits, which Pillow would clip rather than scale
                return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except Exception as error:
        raise ValueError(_reason(error)) from error


def resized(image: Image.Image, window: Integers, size: int) -> Levels:
    """A window (top, left, height, width) as (size, size, 3) uint8, by linear interpolation with antialiasing.

    Beyond the window its outermost pixels are repeated, as DALI does (Pillow would leave them out of the mean): the
    two agree within one level.
    """
    top, left, height, width = window.tolist()
    image = image.crop((left, top, left + width, top + height))
    if (height, width) == (size, size):
        return np.array(image)
    reach = math.ceil(max(height, width, size) / size)
    levels = np.pad(np.asarray(image), ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    box = (reach, reach, reach + width, reach + height)
    return np.array(Image.fromarray(levels).resize((size, size), Image.Resampling.BILINEAR, box=box))


def _reason(error: Exception) -> str:
    """What went wrong, in one line and without the path, which whoever reports it names."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return f"{type(error).__name__}: {error}"
