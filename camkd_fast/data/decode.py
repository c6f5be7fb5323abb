"""Read image files with Pillow: the size from the header, or the pixels of one resized window."""

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
_TAIL = 4096  # bytes at the end of a file in which the end marker is searched: some cameras append data


def image_size(path: Path) -> tuple[int, int]:
    """Height and width from the header. A JPEG without an end marker is decoded to detect truncation.

    Raises:
        ValueError: the file is truncated or not an image; the message gives the reason without the path.
    """
    try:
        with path.open("rb") as file, Image.open(file) as image:
            width, height = image.size
            if image.format == "JPEG":
                file.seek(-min(_TAIL, os.fstat(file.fileno()).st_size), os.SEEK_END)
                if _JPEG_END not in file.read():
                    file.seek(0)
                    image.load()
    except Exception as error:  # Pillow's parsers can raise almost anything
        raise ValueError(_reason(error)) from error
    return height, width


def open_rgb(path: Path) -> Image.Image:
    """The image as RGB. The orientation tag is not applied.

    Raises:
        ValueError: the file cannot be decoded; the message gives the reason without the path.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits: Pillow would clip instead of scale
                return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except Exception as error:
        raise ValueError(_reason(error)) from error


def resized(image: Image.Image, window: Integers, size: int) -> Levels:
    """Resize a window (top, left, height, width) to (size, size, 3) uint8: linear interpolation with antialiasing.

    Edge pixels are repeated beyond the window, as in DALI, and the two agree within one level. Pillow itself would
    average over the pixels inside the window only.
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
    """The reason in one line, without the path, which the caller adds."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a supported format"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return f"{type(error).__name__}: {error}"
