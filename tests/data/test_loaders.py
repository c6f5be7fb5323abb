"""The contract of all loaders: counts, order, views, worker processes and memory. Arrays in memory."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from camkd_fast.data import Augmentation, BadImageError, Batch, LoaderConfig
from tests.support.loader_data import CROP, KINDS, RESIZED, arrays, assert_same, by_sample, image_files, opened

kinds = pytest.mark.parametrize("kind", KINDS)
augmentations = pytest.mark.parametrize("augmentation", [None, CROP, RESIZED], ids=["none", "crop", "resized-crop"])


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
def test_views_may_have_their_own_seed(kind: str) -> None:
    def batches(**seeds: int) -> list[Batch]:
        with opened(arrays(40), kind, augmentation=CROP, views=2, **seeds) as loader:
            return list(loader)

    one, other = batches(seed=0, view_seed=7), batches(seed=1, view_seed=7)
    assert not torch.equal(one[0].index, other[0].index)
    assert torch.equal(by_sample(one)[1], by_sample(other)[1])
    assert not torch.equal(by_sample(one)[1], by_sample(batches(seed=0))[1])
    assert_same(batches(seed=7), batches(seed=7, view_seed=7))


@pytest.mark.parametrize("augmentation", [CROP, RESIZED], ids=["crop", "resized-crop"])
def test_views_of_files_have_their_own_seed_too(augmentation: Augmentation, tmp_path: Path) -> None:
    """The pixels of a sample depend on the view seed only, the order on the seed only."""
    data = image_files(tmp_path, 12, 16, 40)

    def loaded(**seeds: int) -> tuple[list[int], torch.Tensor]:
        with opened(data, "torch", 4, augmentation=augmentation, **seeds) as loader:
            batches = list(loader)
        return torch.cat([batch.index for batch in batches]).tolist(), by_sample(batches)[1]

    order, images = loaded(seed=1, view_seed=7)
    other_order, same_images = loaded(seed=2, view_seed=7)
    same_order, other_images = loaded(seed=1, view_seed=8)
    assert order == same_order != other_order
    assert torch.equal(images, same_images) and not torch.equal(images, other_images)
    assert torch.equal(images, loaded(seed=7)[1])


def test_a_position_holds_the_unreadable_files(tmp_path: Path) -> None:
    """They count as skipped after a resume, whether or not they are met again."""
    data = image_files(tmp_path, 12, 16, 40)
    data.paths[3].write_bytes(b"no image")
    with opened(data, "torch", 4, augmentation=CROP, skip_bad=1) as loader:
        list(loader)
        state = loader.state_dict()
    assert state["bad"] == [3]
    data.paths[5].write_bytes(b"no image")
    with opened(data, "torch", 4, augmentation=CROP, skip_bad=1) as resumed:
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        resumed.set_epoch(1)
        with pytest.raises(BadImageError, match="skip_bad=1"):
            list(resumed)


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 8, "world": 2, "rank": 2}, r"rank must lie in \[0, 2\), got 2"),
        ({"batch_size": 8, "views": 0}, "views must be at least 1, got 0"),
        ({"batch_size": 8, "skip_bad": -1}, "skip_bad must be at least 0, got -1"),
    ],
)
def test_invalid_loader_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoaderConfig(**settings)


@kinds
def test_an_empty_set_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"), opened(arrays(0), kind) as loader:
        pytest.fail(f"{type(loader).__name__} was opened on no images")


@pytest.mark.parametrize("kind", ["resident", "torch"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("augmentation", [None, CROP, RESIZED], ids=["none", "crop", "resized-crop"])
def test_deferred_batches_are_finished_by_one_function(
    augmentation: Augmentation | None, channels_last: bool, kind: str
) -> None:
    data = arrays()
    settings = {"augmentation": augmentation, "channels_last": channels_last}
    with opened(data, kind, **settings) as loader, opened(data, kind, deferred=True, **settings) as other:
        functions = set()
        for epoch in range(2):
            loader.set_epoch(epoch)
            other.set_epoch(epoch)
            for ours, theirs in zip(other, loader, strict=True):
                assert ours.finish is not None and theirs.finish is None
                functions.add(id(ours.finish))
                finished = ours.finish(ours.images)
                assert torch.equal(finished, theirs.images) and finished.stride() == theirs.images.stride()
                assert torch.equal(ours.target, theirs.target) and len(ours.images) == len(ours.target)
        assert len(functions) == 1


def test_worker_processes_give_the_same_batches_and_end(tmp_path: Any) -> None:
    before = set(multiprocessing.active_children())
    for data in (arrays(70), image_files(tmp_path, 12)):
        state = torch.random.get_rng_state()
        with ExitStack() as stack:
            single = stack.enter_context(opened(data, "torch", 8, augmentation=CROP))
            workers = stack.enter_context(opened(data, "torch", 8, augmentation=CROP, workers=2))
            for epoch in range(2):
                single.set_epoch(epoch)
                workers.set_epoch(epoch)
                next(iter(workers))  # ends early: the batches that workers have prepared are dropped
                workers.set_epoch(epoch + 1)
                workers.set_epoch(epoch)
                assert_same(single, workers)
            assert len(set(multiprocessing.active_children()) - before) == 2
        assert not set(multiprocessing.active_children()) - before
        assert torch.equal(state, torch.random.get_rng_state())  # the global generator is not used


def test_labels_of_an_epoch_are_read_at_once(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With worker processes too, whose indices are copies: on a GPU each reading is a copy and a launch."""
    with ExitStack() as stack:
        loader = stack.enter_context(opened(arrays(70), "torch", 8, augmentation=CROP, workers=1))
        whole, calls = loader._labels_of, []

        def counted(batches: Any) -> Any:
            calls.append(len(batches))
            return whole(batches)

        monkeypatch.setattr(loader, "_labels_of", counted)
        assert len(list(loader)) == calls[0] and len(calls) == 1


def resident_memory() -> int:
    """Resident bytes of this process after returning unused memory to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and trims glibc's heap")
@pytest.mark.parametrize(
    ("kind", "workers", "form"),
    [
        ("resident", 0, "arrays"),
        ("dali", 1, "files"),
        ("torch", 1, "files"),
        *(
            pytest.param("dali", 1, "arrays", marks=pytest.mark.slow),
            pytest.param("torch", 0, "files", marks=pytest.mark.slow),
        ),
        *(pytest.param("torch", workers, "arrays", marks=pytest.mark.slow) for workers in (0, 1)),
    ],
)
def test_memory_is_flat_over_epochs(kind: str, workers: int, form: str, tmp_path: Any) -> None:
    """Six epochs of 30 MB of images, after two in which buffers grow to the largest window."""
    data = arrays(2500, 3, 32, 32) if form == "arrays" else image_files(tmp_path, 50, size=224)
    batch_size, augmentation = (50, CROP) if form == "arrays" else (5, RESIZED)
    sizes = []
    with opened(data, kind, batch_size, augmentation=augmentation, workers=workers) as loader:
        for epoch in range(8):
            loader.set_epoch(epoch)
            assert sum(len(batch.target) for batch in loader) == len(data)
            sizes.append(resident_memory())
    # The minimum of three: a leak is in all of them, the allocator's noise is not.
    assert min(sizes[-3:]) <= 1.01 * sizes[1], [size >> 20 for size in sizes]
