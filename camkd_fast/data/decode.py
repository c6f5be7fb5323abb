"""Read image files with Pillow: the header, or the pixels of one resized window.

The format follows from a file's contents. Its ending is never consulted.
"""

from __future__ import annotations

import io
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from .augment import Integers

Levels = NDArray[np.uint8]

_END = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}  # markers that end a complete file
_TAIL = 4096  # bytes at the end of a file in which the marker is searched: some cameras append data
_REFUSED = ("EPS",)  # Pillow would start Ghostscript, which executes the file as a program


class Header(NamedTuple):
    height: int
    width: int
    exact: bool  # on the CPU DALI decodes the file to Pillow's pixels


def read_header(path: Path) -> Header:
    """Header of an image file. A file that does not end as its format demands is decoded to detect truncation.

    Raises:
        ValueError: the file is truncated, not an image, or no regular file; the message gives the reason without the
            path.
    """
    try:
        _check_regular(path)
        with path.open("rb") as file, Image.open(file) as image:
            _check_format(image)
            width, height = image.size
            header = Header(height, width, _decoded_alike(image))
            if not _ends(file, image.format):
                file.seek(0)
                image.load()
    except Exception as error:  # Pillow's parsers can raise almost anything
        raise ValueError(_reason(error)) from error
    return header


def open_rgb(path: Path) -> Image.Image:
    """The image as RGB, the first one of several. Only TIFF's orientation tag is applied, as Pillow does.

    Raises:
        ValueError: the file cannot be decoded; the message gives the reason without the path.
    """
    try:
        _check_regular(path)
        with Image.open(path) as image:
            _check_format(image)
            if image.mode.startswith("I"):  # 16 bits: Pillow would clip instead of scale
                return Image.fromarray(np.rint(np.asarray(image) / 257).clip(0, 255).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except Exception as error:
        raise ValueError(_reason(error)) from error


def encode(image: Image.Image) -> NDArray[np.uint8]:
    """An RGB image as the bytes of an uncompressed file."""
    buffer = io.BytesIO()
    image.save(buffer, "PPM")
    return np.frombuffer(buffer.getvalue(), np.uint8)


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


def _check_regular(path: Path) -> None:
    """Refuse what cannot hold an image. Opening a named pipe would wait for its writer."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("a folder" if stat.S_ISDIR(found.st_mode) else "no regular file")
    if not found.st_size:
        raise ValueError("the file is empty")


def _check_format(image: Image.Image) -> None:
    if image.format in _REFUSED:
        raise ValueError(f"{image.format} files are not read")
    if 0 in image.size:
        raise ValueError(f"an image of {image.width} x {image.height} pixels")


def _decoded_alike(image: ImageFile.ImageFile) -> bool:
    """True for the kinds of files that DALI's CPU decoders are tested to read like Pillow."""
    layout: Any = image.tile[0][3] if image.tile else None  # "RGB;16B", or a tuple that begins with such a name
    name = layout[0] if isinstance(layout, tuple) else layout
    match image.format:
        case "JPEG" | "MPO":
            return image.mode in ("L", "RGB")  # not CMYK
        case "PNG":
            return image.mode == "I;16" or not str(name).endswith(";16B")
        case "WEBP":
            return not getattr(image, "is_animated", False)
        case "BMP":
            return name in ("BGR", "L", "P")  # neither run lengths nor masks
        case "PPM":
            return layout in ("L", "RGB")  # not in text, 255 levels
    return False


def _ends(file: BinaryIO, format: str | None) -> bool:
    """Whether the file ends with the marker of its format."""
    marker = _END.get(format or "")
    if marker is None:
        return False
    file.seek(-min(_TAIL, os.fstat(file.fileno()).st_size), os.SEEK_END)
    return marker in file.read()


def _reason(error: Exception) -> str:
    """The reason in one line, without the path, which the caller adds."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a supported format"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if type(error) is ValueError:
        return str(error)
    return f"{type(error).__name__}: {error}"
