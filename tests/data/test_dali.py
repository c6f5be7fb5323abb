"""Image files loaded with DALI, compared with Pillow and the DataLoader: pixels, augmentation, position."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import nvidia.dali  # noqa: F401  # `make install` installs it: without it these tests fail rather than skip
import pytest
import torch
from PIL import Image
from torch import Tensor

from camkd_fast.data import Augmentation, ImageFiles, LoaderConfig
from camkd_fast.data.augment import records
from camkd_fast.data.dali_loader import DaliLoader
from camkd_fast.data.decode import read_header
from tests.support.loader_data import (
    CROP,
    MEAN,
    RESIZED,
    STD,
    assert_same,
    by_sample,
    levels,
    opened,
    picture,
)

kinds = pytest.mark.parametrize("kind", ["dali", "torch"])
augmentations = pytest.mark.parametrize("augmentation", [None, CROP, RESIZED], ids=["none", "crop", "resized-crop"])


def rgb(path: Path) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(path).convert("RGB"))


def single_file(path: Path, size: int) -> ImageFiles:
    return ImageFiles((path,), torch.zeros(1, dtype=torch.int64), 1, ("a",), MEAN, STD, size)


@kinds
def test_decoded_pixels_equal_pillows(kind: str, files: ImageFiles) -> None:
    """Exactly, because a file's central square at its own size is not resampled."""
    for path in files.paths:
        image = rgb(path)
        side = min(image.shape[:2])
        top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
        data = single_file(path, side)
        with opened(data, kind, 1) as loader:
            (batch,) = loader
        expected = torch.from_numpy(image[top : top + side, left : left + side].copy()).permute(2, 0, 1)
        mean, factor = (torch.tensor(v).view(-1, 1, 1) for v in (MEAN, STD))
        assert torch.equal(batch.images[0], (expected.float() - mean) * (1 / factor)), path


def weights(length: int, size: int) -> Tensor:
    """(size, length): triangular filter of linear interpolation with antialiasing, with repeated edge pixels."""
    scale = length / size
    radius = max(scale, 1.0)
    reach = int(radius) + 2
    taps = torch.arange(-reach, length + reach, dtype=torch.float64)
    centres = (torch.arange(size, dtype=torch.float64) + 0.5) * scale
    raw = (1 - (taps + 0.5 - centres[:, None]).abs() / radius).clamp(min=0)
    raw = raw / raw.sum(1, keepdim=True)
    return torch.zeros(size, length, dtype=torch.float64).index_add_(1, taps.long().clamp(0, length - 1), raw)


@kinds
@pytest.mark.parametrize("channels_last", [False, True])
@augmentations
def test_pixels_match_the_records(
    kind: str, channels_last: bool, augmentation: Augmentation | None, files: ImageFiles
) -> None:
    """Window, linear interpolation in float64, shift, flip: equal within the rounding of one or two passes."""
    bound = 0.502 if kind == "dali" else 1.001
    with opened(files, kind, augmentation=augmentation, channels_last=channels_last) as loader:
        loader.set_epoch(1)
        for batch in loader:
            assert batch.images.shape[1:] == (3, 32, 32)
            format = torch.channels_last if channels_last else torch.contiguous_format
            assert batch.images.is_contiguous(memory_format=format)
            for sample, seen in zip(batch.index.tolist(), levels(batch, files), strict=True):
                image = torch.from_numpy(rgb(files.paths[sample]).copy()).permute(2, 0, 1).double()
                record = records(augmentation, 0, 1, np.array([sample]), np.array([image.shape[1:]]))
                top, left, height, width = record.windows[0].tolist()
                window = image[:, top : top + height, left : left + width]
                expected = weights(height, 32) @ window @ weights(width, 32).T
                dy, dx = record.shifts[0].tolist()
                padded = torch.nn.functional.pad(expected, (8,) * 4)
                expected = padded[:, 8 + dy : 40 + dy, 8 + dx : 40 + dx]
                expected = expected.flip(2) if record.mirrored[0] else expected
                assert (seen - expected).abs().max() <= bound, files.paths[sample]


@augmentations
def test_dali_and_torch_agree_within_one_level(augmentation: Augmentation | None, files: ImageFiles) -> None:
    with (
        opened(files, "dali", augmentation=augmentation) as one,
        opened(files, "torch", augmentation=augmentation) as two,
    ):
        for epoch in range(2):
            one.set_epoch(epoch)
            two.set_epoch(epoch)
            for a, b in zip(one, two, strict=True):
                assert torch.equal(a.index, b.index) and torch.equal(a.target, b.target) and a.view == b.view
                difference = (levels(a, files) - levels(b, files)).abs()
                assert difference.max() <= 1.001
                assert difference.mean() < 0.25


@kinds
def test_sixteen_bits_are_scaled_and_orientation_tags_are_ignored(kind: str, tmp_path: Path) -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (16, 16), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    with opened(single_file(tmp_path / "deep.png", 16), kind, 1) as loader:
        seen = levels(next(iter(loader)), loader.data)  # type: ignore[attr-defined]
    assert (seen - torch.from_numpy(np.rint(deep / 257))).abs().max() < 1e-4  # float32 rounding of levels up to 255

    tag = Image.Exif()
    tag[0x112] = 6  # rotated by 90 degrees
    upright = picture(np.random.default_rng(0), 16, 16)
    upright.save(tmp_path / "untagged.jpg")
    upright.save(tmp_path / "tagged.jpg", exif=tag)
    seen_both = []
    for name in ("untagged.jpg", "tagged.jpg"):
        with opened(single_file(tmp_path / name, 16), kind, 1) as loader:
            seen_both.append(next(iter(loader)).images)
    assert torch.equal(*seen_both)


def test_images_are_not_overwritten_by_later_ones(files: ImageFiles) -> None:
    """They share memory with DALI, which reuses it."""
    with opened(files, "dali", 5, augmentation=CROP) as loader:
        batches = list(loader)
        copies = [batch.images.clone() for batch in batches]
        loader.set_epoch(1)
        assert len(list(loader)) == len(batches)
    for batch, copy in zip(batches, copies, strict=True):
        assert torch.equal(batch.images, copy)


@kinds
@pytest.mark.parametrize("world", [1, 2])
def test_every_file_once_over_all_ranks(kind: str, world: int, files: ImageFiles) -> None:
    index = []
    for rank in range(world):
        with opened(files, kind, 7, augmentation=RESIZED, rank=rank, world=world) as loader:
            mine = torch.cat([batch.index for batch in loader])
            assert len(mine) == loader.num_samples
            index.append(mine)
    assert torch.equal(torch.cat(index).sort().values, torch.arange(36))


@kinds
@pytest.mark.parametrize("done", [1, 4])
def test_resumed_in_mid_epoch_equals_uninterrupted(kind: str, done: int, files: ImageFiles) -> None:
    settings: dict[str, Any] = {"batch_size": 8, "augmentation": RESIZED, "seed": 5}
    with opened(files, kind, **settings) as whole:
        whole.set_epoch(2)
        expected = list(whole)
    with opened(files, kind, **settings) as part, opened(files, kind, **settings) as resumed:
        part.set_epoch(2)
        seen = list(islice(part, done))
        resumed.load_state_dict(part.state_dict())
        assert_same(seen + list(resumed), expected)


def test_new_windows_every_epoch_and_seed(files: ImageFiles) -> None:
    with (
        opened(files, "dali", augmentation=RESIZED) as loader,
        opened(files, "dali", augmentation=RESIZED, seed=1) as other,
    ):
        first = by_sample(loader)[1]
        loader.set_epoch(1)
        assert not torch.equal(first, by_sample(loader)[1])
        assert not torch.equal(first, by_sample(other)[1])


def test_an_unused_dali_loader_ends_its_threads(files: ImageFiles) -> None:
    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    before = threads()
    loader = DaliLoader(files, LoaderConfig(8, workers=3))
    next(iter(loader))
    assert threads() >= before + 3
    loader.close()
    assert threads() < before + 3


def test_sizes_come_from_headers(files: ImageFiles, tmp_path: Path) -> None:
    for path in files.paths:
        assert read_header(path)[:2] == rgb(path).shape[:2]
    jpeg = next(path for path in files.paths if path.suffix == ".jpg")
    padded = tmp_path / "padded.jpg"
    padded.write_bytes(jpeg.read_bytes() + bytes(10_000))  # as some cameras do
    assert read_header(padded) == read_header(jpeg)
