"""Pixels of all loaders: normalisation, crops and flips against slow versions. Arrays in memory."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from camkd_fast.data import Augmentation, LabelledImages, choose
from camkd_fast.data.augment import records
from camkd_fast.data.batch import LoaderConfig
from camkd_fast.data.files import ImageFiles
from tests.support.loader_data import CROP, KINDS, RESIZED, arrays, assert_same, by_sample, levels, opened

kinds = pytest.mark.parametrize("kind", KINDS)
augmentations = pytest.mark.parametrize("augmentation", [None, CROP, RESIZED], ids=["none", "crop", "resized-crop"])


@kinds
@pytest.mark.parametrize(("channels", "H", "W"), [(1, 8, 8), (3, 32, 32), (3, 9, 14)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_evaluation_pixels_are_unchanged(kind: str, channels: int, H: int, W: int, channels_last: bool) -> None:
    data = arrays(50, channels, H, W)
    with opened(data, kind, channels_last=channels_last) as loader:
        images = torch.cat([batch.images for batch in loader])
        format = torch.channels_last if channels_last else torch.contiguous_format
        assert all(batch.images.is_contiguous(memory_format=format) for batch in loader)
    mean, factor = (torch.tensor(v).view(1, -1, 1, 1) for v in (data.mean, data.std))
    assert torch.equal(images, (data.pixels.float() - mean) * (1 / factor))  # bitwise, for every kind
    assert torch.equal(images, data.normalise(data.pixels))
    # Reciprocal, product and quotient are rounded by at most 2^-24 each.
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (data.mean, data.std))
    torch.testing.assert_close(images, (data.pixels.float() - mean) / std, rtol=2**-22, atol=0)


def naive(data: LabelledImages, augmentation: Augmentation, index: Tensor, view: int) -> Tensor:
    """Crops and flips of one image at a time: levels in float64, not rounded."""
    record = records(augmentation, 0, view, index.numpy(), np.array([data.shape[1:]]))
    results = []
    for n, sample in enumerate(index.tolist()):
        image = data.pixels[sample].numpy().astype(np.float64)
        _, H, W = image.shape
        if augmentation.kind == "crop":
            dy, dx = record.shifts[n]
            source = np.zeros_like(image)
            for y in range(H):
                for x in range(W):
                    if 0 <= y + dy < H and 0 <= x + dx < W:
                        source[:, y, x] = image[:, y + dy, x + dx]
        else:
            top, left, height, width = record.windows[n]
            window = image[:, top : top + height, left : left + width]
            rows, columns = ((np.arange(S) + 0.5) * s / S - 0.5 for S, s in ((H, height), (W, width)))
            for axis, at in ((1, rows), (2, columns)):
                at = at.clip(0, window.shape[axis] - 1)
                below = np.floor(at).astype(int)
                above = np.minimum(below + 1, window.shape[axis] - 1)
                fraction = (at - below)[(slice(None), None) if axis == 1 else slice(None)]
                window = window.take(below, axis) * (1 - fraction) + window.take(above, axis) * fraction
            source = window
        results.append(source[:, :, ::-1] if record.mirrored[n] else source)
    return torch.from_numpy(np.stack(results).copy())


@kinds
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("channels", "H", "W"), [(1, 8, 8), (3, 12, 17)])
@pytest.mark.parametrize("augmentation", [CROP, RESIZED], ids=["crop", "resized-crop"])
def test_augmented_pixels_match_the_records(
    kind: str, channels: int, H: int, W: int, channels_last: bool, augmentation: Augmentation
) -> None:
    data = arrays(50, channels, H, W)
    # Crops: float32 rounding of levels up to 255. Interpolated levels are rounded to integers once.
    bound = 2e-4 if augmentation.kind == "crop" else 0.502
    with opened(data, kind, augmentation=augmentation, channels_last=channels_last) as loader:
        for epoch in range(2):
            loader.set_epoch(epoch)
            for batch in loader:
                expected = naive(data, augmentation, batch.index, epoch)
                assert (levels(batch, data) - expected).abs().max() <= bound


@augmentations
def test_the_three_loaders_agree(augmentation: Augmentation | None) -> None:
    data = arrays(70, 3, 20, 20)
    with ExitStack() as stack:
        loaders = [stack.enter_context(opened(data, kind, augmentation=augmentation)) for kind in KINDS]
        for resident, dali, torch_ in zip(*loaders, strict=True):
            assert_same([resident], [torch_])
            if augmentation is RESIZED:  # one level if rounding goes the other way at one half
                assert (levels(resident, data) - levels(dali, data)).abs().max() <= 1.001
                dali = dali._replace(images=resident.images)
            assert_same([resident], [dali])


def test_files_of_one_pixel_are_mirrored(tmp_path: Path) -> None:
    """An axis of length 1 keeps a negative stride in what NumPy calls contiguous, which torch refuses."""
    paths = tuple(tmp_path / f"{i}.png" for i in range(8))
    for i, path in enumerate(paths):
        Image.new("RGB", (1, 1), (i, 0, 0)).save(path)
    images = ImageFiles(paths, torch.zeros(8, dtype=torch.int64), 1, ("a",), (0.0,) * 3, (1.0,) * 3, 1)
    with closing(choose.loader(images, LoaderConfig(4, augmentation=Augmentation(padding=0)), "torch")) as loader:
        reds = sorted(float(red) for batch in loader for red in batch.images[:, 0, 0, 0])
    assert reds == list(range(8))


@kinds
def test_shifts_and_flips_are_uniform_in_the_pixels(kind: str) -> None:
    """Position and order of three marked pixels: chi-square over 9 shifts and 2 directions."""
    pixels = torch.zeros(3000, 1, 7, 7, dtype=torch.uint8)
    pixels[:, 0, 3, 2:5] = torch.tensor([60, 180, 240], dtype=torch.uint8)
    data = LabelledImages(pixels, torch.zeros(3000, dtype=torch.int64), 1, (0.0,), (1.0,))
    with opened(data, kind, 500, augmentation=Augmentation(padding=1)) as loader:
        images = by_sample(loader)[1]
    centre = (images == 180).flatten(1).int().argmax(1)
    row, column = centre // 7, centre % 7
    mirrored = images[torch.arange(3000), 0, row, column - 1] == 240
    cells = ((row - 2) * 3 + (column - 2)) * 2 + mirrored
    counts = torch.bincount(cells, minlength=18).double()
    assert counts.numel() == 18
    assert ((counts - 3000 / 18) ** 2 / (3000 / 18)).sum() < 46.0  # 17 degrees of freedom, probability 2e-4
