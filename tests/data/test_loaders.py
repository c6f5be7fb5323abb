"""One contract, three loaders: counts, order, resumption, pixels, memory. Arrays in memory."""

from __future__ import annotations

import ctypes
import gc
import io
import multiprocessing
import os
import sys
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from camkd_fast.data import Augmentation, Batch, LabelledImages, LoaderConfig
from camkd_fast.data.augment import records
from tests.support.loader_data import CROP, KINDS, RESIZED, arrays, assert_same, by_sample, image_files, levels, opened

kinds = pytest.mark.parametrize("kind", KINDS)
augmentations = pytest.mark.parametrize("augmentation", [None, CROP, RESIZED], ids=["none", "crop", "resized-crop"])


def reloaded(state: dict[str, Any]) -> dict[str, Any]:
    """Written and read as a checkpoint is."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --- counts and order ------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("world", [1, 2, 3])
@augmentations
def test_exact_counts_per_rank_and_every_sample_once(kind: str, world: int, augmentation: Augmentation | None) -> None:
    data = arrays(70)
    everything = []
    for rank in range(world):
        with opened(data, kind, 8, augmentation=augmentation, rank=rank, world=world) as loader:
            batches = list(loader)
            assert len(batches) == len(loader)
            assert sum(len(batch.target) for batch in batches) == loader.num_samples
            for batch in batches:
                assert batch.images.shape == (len(batch.index), 3, 12, 12)
                assert batch.images.dtype == torch.float32 and batch.images.isfinite().all()
                assert batch.index.dtype == torch.int64 and torch.equal(batch.target, data.labels[batch.index])
            everything += [batch.index for batch in batches]
    index = torch.cat(everything)
    assert torch.equal(index.sort().values, torch.arange(70))
    if augmentation is None and world == 1:
        assert torch.equal(index, torch.arange(70))


@kinds
def test_two_ranks_see_what_one_sees_at_every_step(kind: str) -> None:
    data = arrays(70)
    with ExitStack() as stack:
        one = stack.enter_context(opened(data, kind, 16, augmentation=CROP))
        two = [stack.enter_context(opened(data, kind, 8, augmentation=CROP, rank=r, world=2)) for r in range(2)]
        for batch, first, second in zip(one, *two, strict=True):
            assert torch.equal(batch.index, torch.cat([first.index, second.index]))
            assert torch.equal(batch.images, torch.cat([first.images, second.images]))


@kinds
def test_order_and_crops_change_with_epoch_and_seed_and_repeat(kind: str) -> None:
    data = arrays(40)

    def epoch_of(seed: int, epoch: int) -> list[Batch]:
        with opened(data, kind, seed=seed, augmentation=CROP) as loader:
            loader.set_epoch(epoch)
            return list(loader)

    first = epoch_of(0, 0)
    assert_same(first, epoch_of(0, 0))
    for other in (epoch_of(0, 1), epoch_of(1, 0)):
        assert not torch.equal(torch.cat([b.index for b in first]), torch.cat([b.index for b in other]))
        assert not torch.equal(by_sample(first)[1], by_sample(other)[1])


@kinds
def test_views_may_have_a_seed_of_their_own(kind: str) -> None:
    def batches(**seeds: int) -> list[Batch]:
        with opened(arrays(40), kind, augmentation=CROP, views=2, **seeds) as loader:
            return list(loader)

    one, other = batches(seed=0, view_seed=7), batches(seed=1, view_seed=7)
    assert not torch.equal(one[0].index, other[0].index)
    assert torch.equal(by_sample(one)[1], by_sample(other)[1])
    assert not torch.equal(by_sample(one)[1], by_sample(batches(seed=0))[1])
    assert_same(batches(seed=7), batches(seed=7, view_seed=7))


@kinds
def test_views_repeat_bit_by_bit_in_another_order(kind: str) -> None:
    epochs = []
    with opened(arrays(40), kind, augmentation=CROP, views=2) as loader:
        for epoch in range(4):
            loader.set_epoch(epoch)
            epochs.append(list(loader))
    assert [batches[0].view for batches in epochs] == [0, 1, 0, 1]
    images = [by_sample(batches)[1] for batches in epochs]
    assert torch.equal(images[0], images[2]) and torch.equal(images[1], images[3])
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(epochs[0][0].index, epochs[2][0].index)


# --- position --------------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("done", [0, 1, 3, 5])
@augmentations
def test_resumed_in_mid_epoch_equals_uninterrupted(kind: str, done: int, augmentation: Augmentation | None) -> None:
    data = arrays(70)
    with opened(data, kind, augmentation=augmentation) as whole, opened(data, kind, augmentation=augmentation) as part:
        whole.set_epoch(3)
        part.set_epoch(3)
        expected = list(whole)
        assert len(expected) == 5
        iterator = iter(part)
        seen = list(islice(iterator, done))
        state = reloaded(part.state_dict())
        next(iterator, None)  # what comes after the state was taken does not matter
        with opened(data, kind, augmentation=augmentation) as resumed:
            resumed.load_state_dict(state)
            resumed.set_epoch(3)
            assert_same(seen + list(resumed), expected)
            assert_same(resumed, expected)  # the position is 0 again
            resumed.set_epoch(4)
            whole.set_epoch(4)
            assert_same(resumed, whole)


@kinds
def test_an_iteration_left_early_continues_or_starts_another_epoch(kind: str) -> None:
    with opened(arrays(70), kind, augmentation=CROP) as loader, opened(arrays(70), kind, augmentation=CROP) as other:
        expected = list(other)
        assert_same(islice(loader, 2), expected[:2])
        assert_same(loader, expected[2:])
        next(iter(loader))
        loader.set_epoch(1)
        other.set_epoch(1)
        assert_same(loader, other)


@kinds
def test_resumed_on_another_number_of_ranks(kind: str) -> None:
    data = arrays(70)
    with opened(data, kind, 16, augmentation=CROP) as one:
        batches = iter(one)
        next(batches)
        state = reloaded(one.state_dict())
        rest = list(batches)
    with ExitStack() as stack:
        two = [stack.enter_context(opened(data, kind, 8, augmentation=CROP, rank=r, world=2)) for r in range(2)]
        for loader in two:
            loader.load_state_dict(state)
        for expected, *parts in zip(rest, *two, strict=True):
            assert torch.equal(expected.index, torch.cat([part.index for part in parts]))
            assert torch.equal(expected.images, torch.cat([part.images for part in parts]))


def test_resumed_by_another_kind_of_loader() -> None:
    data = arrays(70)
    with opened(data, "resident", augmentation=CROP) as resident, opened(data, "dali", augmentation=CROP) as dali:
        next(iter(resident))
        dali.load_state_dict(reloaded(resident.state_dict()))
        assert_same(dali, resident)


def test_a_position_that_other_ranks_cannot_express_is_refused() -> None:
    data = arrays(67)  # the rest of 3 is a batch for one rank, but not for two
    with opened(data, "resident", 16, augmentation=CROP) as one:
        assert [len(batch.index) for batch in islice(one, 4)] == [16] * 4
        state = one.state_dict()
        assert [len(batch.index) for batch in one] == [3]
    with opened(data, "resident", 8, augmentation=CROP, world=2) as two:
        with pytest.raises(ValueError, match="before batch 4 of 5, this loader has 4"):
            two.load_state_dict(state)
        two.load_state_dict({**state, "batch": 5})
        assert list(two) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed 0, this loader has 1"),
        ({"view_seed": 1}, "augmentation seed 0, this loader has 1"),
        ({"batch_size": 20}, "global batch 16, this loader has 20"),
        ({"augmentation": Augmentation(padding=2)}, "padding=3.*padding=2"),
        ({"augmentation": None}, "padding=3.*'None'"),
        ({"views": 4}, "views None, this loader has 4"),
    ],
)
@kinds
def test_a_position_of_other_settings_is_refused(kind: str, change: dict[str, Any], message: str) -> None:
    data = arrays()
    settings = {"batch_size": 16, "augmentation": CROP}
    with opened(data, kind, **settings) as saved:
        state = saved.state_dict()
    with opened(data, kind, **{**settings, **change}) as other, pytest.raises(ValueError, match=message):
        other.load_state_dict(state)


def test_a_position_in_other_data_is_refused() -> None:
    data = arrays(70)
    with opened(data, "resident") as saved:
        state = saved.state_dict()
    with opened(arrays(71), "resident") as other, pytest.raises(ValueError, match="samples 70, this loader has 71"):
        other.load_state_dict(state)
    relabelled = replace(data, labels=data.labels.flip(0))
    with opened(relabelled, "resident") as other, pytest.raises(ValueError, match="labels '"):
        other.load_state_dict(state)


# --- pixels ----------------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize(("channels", "H", "W"), [(1, 8, 8), (3, 32, 32), (3, 9, 14)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_evaluation_pixels_are_the_stored_ones(kind: str, channels: int, H: int, W: int, channels_last: bool) -> None:
    data = arrays(50, channels, H, W)
    with opened(data, kind, channels_last=channels_last) as loader:
        images = torch.cat([batch.images for batch in loader])
        format = torch.channels_last if channels_last else torch.contiguous_format
        assert all(batch.images.is_contiguous(memory_format=format) for batch in loader)
    mean, factor = (torch.tensor(v).view(1, -1, 1, 1) for v in (data.mean, data.std))
    assert torch.equal(images, (data.pixels.float() - mean) * (1 / factor))  # exactly, and so for every kind
    torch.testing.assert_close(images, data.normalise(data.pixels), rtol=0, atol=5e-7)


def naive(data: LabelledImages, augmentation: Augmentation, index: Tensor, view: int) -> Tensor:
    """Crops and flips of one image after the other, in levels; float64, not rounded."""
    made = records(augmentation, 0, view, index.numpy(), np.array([data.shape[1:]]))
    results = []
    for n, sample in enumerate(index.tolist()):
        image = data.pixels[sample].numpy().astype(np.float64)
        _, H, W = image.shape
        if augmentation.kind == "crop":
            dy, dx = made.shifts[n]
            source = np.zeros_like(image)
            for y in range(H):
                for x in range(W):
                    if 0 <= y + dy < H and 0 <= x + dx < W:
                        source[:, y, x] = image[:, y + dy, x + dx]
        else:
            top, left, height, width = made.windows[n]
            window = image[:, top : top + height, left : left + width]
            rows, columns = ((np.arange(S) + 0.5) * s / S - 0.5 for S, s in ((H, height), (W, width)))
            for axis, at in ((1, rows), (2, columns)):
                at = at.clip(0, window.shape[axis] - 1)
                below = np.floor(at).astype(int)
                above = np.minimum(below + 1, window.shape[axis] - 1)
                share = (at - below)[(slice(None), None) if axis == 1 else slice(None)]
                window = window.take(below, axis) * (1 - share) + window.take(above, axis) * share
            source = window
        results.append(source[:, :, ::-1] if made.mirrored[n] else source)
    return torch.from_numpy(np.stack(results).copy())


@kinds
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("channels", "H", "W"), [(1, 8, 8), (3, 12, 17)])
@pytest.mark.parametrize("augmentation", [CROP, RESIZED], ids=["crop", "resized-crop"])
def test_augmented_pixels_are_those_of_the_records(
    kind: str, channels: int, H: int, W: int, channels_last: bool, augmentation: Augmentation
) -> None:
    data = arrays(50, channels, H, W)
    # Interpolated levels are rounded to integers once.
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
            if augmentation is RESIZED:  # a level where the rounding falls on the other side of one half
                assert (levels(resident, data) - levels(dali, data)).abs().max() <= 1.001
                dali = dali._replace(images=resident.images)
            assert_same([resident], [dali])


@kinds
def test_shifts_and_flips_are_uniform_in_the_pixels(kind: str) -> None:
    """Where a bright pair of pixels ends up, and in which order: chi-square over 9 shifts and 2 directions."""
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 8, "world": 2, "rank": 2}, r"rank must lie in \[0, 2\), got 2"),
        ({"batch_size": 8, "views": 0}, "views must be at least 1, got 0"),
        ({"batch_size": 8, "skip_bad": -1}, "skip_bad must be at least 0, got -1"),
    ],
)
def test_unfit_loader_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoaderConfig(**settings)


@kinds
def test_an_empty_set_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"), opened(arrays(0), kind) as loader:
        pytest.fail(f"{type(loader).__name__} was opened on no images")


# --- processes and memory --------------------------------------------------------------------------------------------


def test_worker_processes_give_the_same_batches_and_end(tmp_path: Any) -> None:
    before = set(multiprocessing.active_children())
    for data in (arrays(70), image_files(tmp_path, 12)):
        state = torch.random.get_rng_state()
        with ExitStack() as stack:
            alone = stack.enter_context(opened(data, "torch", 8, augmentation=CROP))
            shared = stack.enter_context(opened(data, "torch", 8, augmentation=CROP, workers=2))
            for epoch in range(2):
                alone.set_epoch(epoch)
                shared.set_epoch(epoch)
                next(iter(shared))  # left early: what the workers had in hand is dropped
                shared.set_epoch(epoch + 1)
                shared.set_epoch(epoch)
                assert_same(alone, shared)
            assert len(set(multiprocessing.active_children()) - before) == 2
        assert not set(multiprocessing.active_children()) - before
        assert torch.equal(state, torch.random.get_rng_state())  # the loop's own random numbers are left alone


def resident_memory() -> int:
    """Bytes of this process, without what Python and the C library keep for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and trims glibc's heap")
@pytest.mark.parametrize(
    ("kind", "workers", "form"),
    [
        *(("resident", 0, "arrays"), ("dali", 1, "arrays"), ("torch", 0, "arrays"), ("torch", 1, "arrays")),
        *(("dali", 1, "files"), ("torch", 0, "files"), ("torch", 1, "files")),
    ],
)
def test_memory_is_flat_over_epochs(kind: str, workers: int, form: str, tmp_path: Any) -> None:
    """Six epochs after two in which buffers grow to the largest window. An epoch delivers 30 MB of images."""
    data = arrays(2500, 3, 32, 32) if form == "arrays" else image_files(tmp_path, 50, size=224)
    batch_size, augmentation = (50, CROP) if form == "arrays" else (5, RESIZED)
    sizes = []
    with opened(data, kind, batch_size, augmentation=augmentation, workers=workers) as loader:
        for epoch in range(8):
            loader.set_epoch(epoch)
            assert sum(len(batch.target) for batch in loader) == len(data)
            sizes.append(resident_memory())
    # The least of three: a leak is in all of them, the allocator's noise is not.
    assert min(sizes[-3:]) <= 1.01 * sizes[1], [size >> 20 for size in sizes]
