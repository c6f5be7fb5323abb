"""Saving and restoring a loader's position: within an epoch, on other ranks, by another loader, with other settings."""

from __future__ import annotations

import io
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch

from camkd_fast.data import Augmentation
from tests.support.loader_data import CROP, KINDS, RESIZED, arrays, assert_same, opened

kinds = pytest.mark.parametrize("kind", KINDS)
augmentations = pytest.mark.parametrize("augmentation", [None, CROP, RESIZED], ids=["none", "crop", "resized-crop"])


def reloaded(state: dict[str, Any]) -> dict[str, Any]:
    """The state after saving and loading it as in a checkpoint."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


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
        next(iterator, None)  # batches after the state was saved have no effect
        with opened(data, kind, augmentation=augmentation) as resumed:
            resumed.load_state_dict(state)
            resumed.set_epoch(3)
            assert_same(seen + list(resumed), expected)
            assert_same(resumed, expected)  # the position is 0 again
            resumed.set_epoch(4)
            whole.set_epoch(4)
            assert_same(resumed, whole)


@kinds
def test_an_iteration_that_ends_early_continues_or_starts_another_epoch(kind: str) -> None:
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
    data = arrays(67)  # the last 3 samples are a batch on one rank, but not on two
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
def test_a_position_with_other_settings_is_refused(kind: str, change: dict[str, Any], message: str) -> None:
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


def test_a_position_in_other_classes_is_refused() -> None:
    """Equal labels of renamed folders mean other classes. Unknown names are taken to be the same."""
    data = replace(arrays(), class_names=tuple("abcdefg"))
    with opened(data, "resident") as saved:
        state = saved.state_dict()
    for names, message in (
        (("a", "x", *"cdefg"), "a class 'b' where this loader has 'x'"),
        (tuple("bacdefg"), "'a'.*'b'"),
    ):
        renamed = replace(data, class_names=names)
        with opened(renamed, "resident") as other, pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
    with opened(replace(data, class_names=None), "resident") as other, opened(data, "resident") as same:
        other.load_state_dict(state)
        same.load_state_dict(
            {name: value for name, value in state.items() if name != "classes"}
        )  # an earlier version's
        same.load_state_dict(other.state_dict())
