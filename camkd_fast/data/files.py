"""Labelled image files. Only paths are kept, so a set of any size takes little memory."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from .headers import Headers, read_headers
from .images import LabelledImages

# Statistics of the ImageNet training set, in pixel levels: the usual normalisation of ImageNet models.
IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)


@dataclass(frozen=True)
class ImageFiles:
    """Image files with labels. Loaders decode them to RGB and yield squares of `size` pixels."""

    paths: tuple[Path, ...]  # length N
    labels: Tensor  # (N,) int64 in [0, num_classes)
    num_classes: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]  # per channel, in pixel levels
    std: tuple[float, ...]
    size: int  # side of the images that loaders yield, pixels

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, H, W) of every image that a loader yields."""
        return self.channels, self.size, self.size

    @property
    def channels(self) -> int:
        return 3

    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of the files' contents, labels, order, normalisation and size.

        Paths are excluded, so that a set can be moved. Reads every file, once; one that cannot be read counts as empty.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        settings = (len(self), self.num_classes, self.mean, self.std, self.size)
        digest = hashlib.sha256(repr(settings).encode())
        # Threads hide the latency of opening files; hashing releases the GIL.
        with ThreadPoolExecutor(8) as pool:
            for content in pool.map(_sha256, self.paths):
                digest.update(content)
        digest.update(self.labels.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def headers(self) -> Headers:
        """Headers of the files, read once and cached on disk (see `headers.read_headers`)."""
        return self._headers

    @cached_property
    def _headers(self) -> Headers:
        return read_headers(self.paths)

    def take(self, index: Tensor) -> ImageFiles:
        """The files at `index` (M,) int64."""
        return replace(self, paths=tuple(self.paths[i] for i in index.tolist()), labels=self.labels[index])


def _sha256(path: Path) -> bytes:
    content = b""
    if path.is_file():  # a named pipe would wait for its writer
        with suppress(OSError):
            content = path.read_bytes()
    return hashlib.sha256(content).digest()


ImageSet = LabelledImages | ImageFiles
