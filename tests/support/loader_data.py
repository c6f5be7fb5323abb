"""Small image sets and assertions for the loader tests."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from camkd_fast.data import Augmentation, Batch, ImageFiles, LabelledImages, Loader, LoaderConfig, choose
from camkd_fast.data.files import ImageSet

KINDS = ("resident", "dali", "torch")
CROP = Augmentation(padding=3)
RESIZED = Augmentation("resized-crop")
MEAN, STD = (125.3, 120.7, 110.1), (60.3, 61.2, 62.9)


def arrays(N: int = 70, channels: int = 3, H: int = 12, W: int = 12, seed: int = 0) -> LabelledImages:
    """White noise, so that all crops of all images differ."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (N, channels, H, W), generator=generator, dtype=torch.uint8)
    labels = torch.randint(7, (N,), generator=generator)
    return LabelledImages(pixels, labels, 7, MEAN[:channels], STD[:channels])


def idx(values: np.ndarray, dims: int | None = None) -> bytes:
    """An uncompressed IDX file of unsigned bytes; `dims` is the number of dimensions in its header."""
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, dims or values.ndim, *values.shape)
    return header + values.astype(np.uint8).tobytes()


def fashion_folder(root: Path, train: int = 40, test: int = 10) -> Path:
    """Fashion-MNIST's four files, filled with white noise."""
    root.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", train), ("t10k", test)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28))
        (root / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pixels)))
        (root / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.arange(count) % 10)))
    return root


def picture(generator: np.random.Generator, H: int, W: int) -> Image.Image:
    """Coarse blobs, which JPEG preserves, with noise, which shows wrong resampling."""
    coarse = generator.integers(0, 256, (H // 8 + 2, W // 8 + 2, 3), dtype=np.uint8)
    levels = np.asarray(Image.fromarray(coarse).resize((W, H), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((levels + generator.integers(-9, 10, levels.shape)).clip(0, 255).astype(np.uint8))


def image_files(folder: Path, N: int = 24, size: int = 32, largest: int = 120) -> ImageFiles:
    """JPEG (all chroma subsamplings, some progressive or grey) and PNG (RGB, grey, palette, alpha) of many sizes."""
    generator = np.random.default_rng(0)
    paths = []
    for n in range(N):
        H, W = generator.integers(10, largest, 2).tolist()
        image = picture(generator, H, W)
        if n % 3 == 0:
            path, options = folder / f"{n}.png", {}
            image = image.convert(("RGB", "L", "P", "RGBA")[n // 3 % 4])
        else:
            path = folder / f"{n}.jpg"
            options = {"quality": int(generator.integers(60, 98)), "subsampling": n % 3, "progressive": n % 5 == 0}
            image = image.convert("L" if n % 7 == 0 else "RGB")
        image.save(path, **options)
        paths.append(path)
    labels = torch.arange(N) % 4
    return ImageFiles(tuple(paths), labels, 4, ("a", "b", "c", "d"), MEAN, STD, size)


@contextmanager
def opened(data: ImageSet, kind: str, batch_size: int = 16, **settings: object) -> Iterator[Loader]:
    """A loader that is closed at the end; by default without worker processes."""
    workers = {"workers": 1 if kind == "dali" else 0}
    with closing(choose.loader(data, LoaderConfig(batch_size, **{**workers, **settings}), kind)) as loader:  # type: ignore[arg-type]
        yield loader


def levels(batch: Batch, data: ImageSet) -> Tensor:
    """Pixel levels before normalisation, float32."""
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (data.mean, data.std))
    return batch.images * std + mean


def by_sample(batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """All indices in ascending order, and the images in that order."""
    batches = list(batches)
    index, order = torch.cat([batch.index for batch in batches]).sort()
    return index, torch.cat([batch.images for batch in batches])[order]


def assert_same(first: Iterable[Batch], second: Iterable[Batch]) -> None:
    """Assert that the batches are bitwise equal."""
    for a, b in zip(first, second, strict=True):
        assert a.view == b.view
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.target, b.target)
        assert torch.equal(a.images, b.images)
