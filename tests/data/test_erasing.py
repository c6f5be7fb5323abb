"""Random erasing: boxes of the configured areas and shapes, and RandAugment and erasing in every loader."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import nvidia.dali  # noqa: F401  # `make install` installs it: without it these tests fail rather than skip
import pytest
import torch
from torch import Tensor

from camkd_fast.data import Augmentation
from camkd_fast.data.batch import LoaderConfig
from camkd_fast.data.erasing import boxes, erase
from camkd_fast.data.files import ImageSet
from camkd_fast.data.rand_augment import draws, rand_augment
from camkd_fast.data.resident import ResidentLoader
from tests.support.loader_data import CROP, RESIZED, arrays, assert_same, by_sample, image_files, levels, opened

ALL = {"rand_augment": (2, 12), "erasing": 0.5}


def test_boxes_have_torchvisions_areas_and_shapes() -> None:
    n, H, W = 20000, 224, 256
    top, left, bottom, right = boxes(0.25, 0, 0, np.arange(n), H, W).T
    height, width = bottom - top, right - left
    erased = height > 0
    assert abs(erased.mean() - 0.25) < 4 * (0.1875 / n) ** 0.5
    assert (top >= 0).all() and (left >= 0).all() and (bottom <= H).all() and (right <= W).all()
    area, ratio = (height * width)[erased] / (H * W), np.log(height[erased] / width[erased]) / np.log(1 / 0.3)
    assert area.min() > 0.019 and area.max() < 0.335 and abs(np.median(area) - 0.175) < 0.01
    assert ratio.min() > -1.02 and ratio.max() < 1.02 and abs(np.median(ratio)) < 0.04
    free = (top[erased] / (H - height[erased]), left[erased] / (W - width[erased]))
    for position in free:
        assert abs(position.mean() - 0.5) < 0.02
    assert (boxes(0.0, 0, 0, np.arange(99), H, W)[:, 2:] <= boxes(0.0, 0, 0, np.arange(99), H, W)[:, :2]).all()
    assert (boxes(1.0, 0, 0, np.arange(999), H, W)[:, 2] > boxes(1.0, 0, 0, np.arange(999), H, W)[:, 0]).all()


def test_boxes_depend_on_seed_view_and_sample_only() -> None:
    index = np.arange(500)
    first, order = boxes(0.5, 3, 2, index, 32, 32), np.random.default_rng(0).permutation(500)
    np.testing.assert_array_equal(boxes(0.5, 3, 2, index[order], 32, 32), first[order])
    for other in (
        boxes(0.5, 4, 2, index, 32, 32),
        boxes(0.5, 3, 3, index, 32, 32),
        boxes(0.5, 3, 2, index + 500, 32, 32),
    ):
        assert abs(np.corrcoef(first[:, 2] > first[:, 0], other[:, 2] > other[:, 0])[0, 1]) < 0.2
    # Views of caches and interrupted runs depend on them.
    assert first[:4].tolist() == [[23, 16, 27, 28], [22, 1, 32, 29], [24, 1, 24, 1], [25, 27, 25, 27]]


def test_a_box_is_zero_and_the_rest_stays() -> None:
    images = torch.randn(3, 2, 6, 7)
    before = images.clone()
    given = torch.tensor([[1, 2, 4, 6], [0, 0, 0, 0], [0, 0, 6, 7]])
    assert erase(images, given) is images
    mask = torch.ones(3, 1, 6, 7)
    mask[0, :, 1:4, 2:6] = mask[2] = 0
    assert torch.equal(images, before * mask)


def test_images_too_small_for_a_box_stay() -> None:
    assert (np.diff(boxes(1.0, 0, 0, np.arange(50), 1, 1).reshape(50, 2, 2), axis=1) == 0).all()


# --- loaders ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    return image_files(tmp_path_factory.mktemp("images"), 24)


CASES = [
    *(("resident", "arrays", kind) for kind in (CROP, RESIZED)),
    *(("torch", "arrays", CROP), ("dali", "arrays", RESIZED)),
    *((loader, "files", RESIZED) for loader in ("torch", "dali")),
]


def images_of(data: ImageSet, kind: str, augmentation: Augmentation, epoch: int = 1, **settings: Any) -> Tensor:
    with opened(data, kind, 7, augmentation=augmentation, seed=3, **settings) as loader:
        loader.set_epoch(epoch)
        return by_sample(loader)[1]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("kind", "of", "augmentation"), CASES)
def test_loaders_augment_their_crops(
    kind: str, of: str, augmentation: Augmentation, channels_last: bool, files: ImageSet
) -> None:
    """RandAugment of the crop's levels, then the normalisation, then the box."""
    data = files if of == "files" else arrays(25)
    format = {"channels_last": channels_last}
    crops = images_of(data, kind, augmentation, **format)
    found = images_of(data, kind, replace(augmentation, **ALL), **format)
    index = np.arange(len(data))
    pixels = levels(type("Batch", (), {"images": crops})(), data).round().to(torch.uint8)
    augmented = rand_augment(pixels, draws(2, 3, 1, index), 12)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (data.mean, data.std))
    expected = (augmented.float() - mean) * (1 / std)
    _, H, W = data.shape
    erase(expected, torch.from_numpy(boxes(0.5, 3, 1, index, H, W)))
    assert (found - expected).abs().max() < 1e-5
    assert (found == 0).float().mean() > 0.02 and (found - crops).abs().mean() > 0.1
    if channels_last:
        with opened(data, kind, 7, augmentation=replace(augmentation, **ALL), channels_last=True) as loader:
            assert next(iter(loader)).images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["torch", "dali"])
def test_resumed_in_mid_epoch_equals_uninterrupted(kind: str, files: ImageSet) -> None:
    settings: dict[str, Any] = {"batch_size": 5, "augmentation": replace(RESIZED, **ALL), "seed": 5}
    with opened(files, kind, **settings) as whole, opened(files, kind, **settings) as part:
        whole.set_epoch(2)
        part.set_epoch(2)
        seen = list(islice(part, 2))
        state = part.state_dict()
        expected = list(whole)
    with opened(files, kind, **settings) as resumed:
        resumed.load_state_dict(state)
        assert_same(seen + list(resumed), expected)
    with (
        opened(files, kind, **{**settings, "augmentation": RESIZED}) as other,
        pytest.raises(ValueError, match=r"augmentation .*rand_augment=\(2, 12\), erasing=0.5"),
    ):
        other.load_state_dict(state)


def test_deferred_pixels_are_finished_by_the_loader() -> None:
    """Operations differ by sample, so that a recorded step cannot do them."""
    for more, finished in (({}, False), ({"erasing": 0.5}, True), ({"rand_augment": (1, 5)}, True)):
        config = LoaderConfig(8, augmentation=replace(CROP, **more), deferred=True)
        batch = next(iter(ResidentLoader(arrays(20), config)))
        assert (batch.finish is None) == finished and (batch.images.shape[1:] == (3, 12, 12)) == finished
        images = batch.images if finished else batch.finish(batch.images)  # type: ignore[misc]
        eager = next(iter(ResidentLoader(arrays(20), replace(config, deferred=False))))
        assert torch.equal(images, eager.images)


def test_evaluation_is_not_augmented(files: ImageSet) -> None:
    with opened(files, "torch", 7, augmentation=None) as loader:
        assert not loader._augments_levels  # type: ignore[attr-defined]


def test_refused() -> None:
    with pytest.raises(ValueError, match=r"erasing must lie in \[0, 1\], got 1.5"):
        Augmentation(erasing=1.5)


def test_a_worker_process_gives_the_same(files: ImageSet, tmp_path: Path) -> None:
    both = [images_of(files, "torch", replace(RESIZED, **ALL), workers=workers) for workers in (0, 2)]
    assert torch.equal(*both)
