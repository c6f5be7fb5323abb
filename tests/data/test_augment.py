"""Augmentation records: the window, shift and flip of each sample."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from camkd_fast.data import Augmentation
from camkd_fast.data.augment import central_squares, records
from tests.support.loader_data import CROP, RESIZED


@given(st.integers(0, 10**9), st.integers(0, 10**6), st.permutations(list(range(30))), st.sampled_from([CROP, RESIZED]))
def test_a_record_depends_only_on_seed_view_and_sample(
    seed: int, view: int, order: list[int], augmentation: Augmentation
) -> None:
    sizes = np.random.default_rng(0).integers(5, 99, (30, 2))
    together = records(augmentation, seed, view, np.arange(30), sizes)
    shuffled = records(augmentation, seed, view, np.array(order), sizes[order])
    single = records(augmentation, seed, view, np.array([7]), sizes[[7]])
    for a, b, c in zip(together, shuffled, single, strict=True):
        np.testing.assert_array_equal(a[order], b)
        np.testing.assert_array_equal(a[[7]], c)


def test_records_are_uniform_and_independent() -> None:
    n = 20000
    index = np.arange(n)
    size = np.array([[64, 64]])
    first = records(CROP, 0, 0, index, size)
    shifts = first.shifts - first.shifts.min()
    counts = np.bincount(shifts[:, 0] * 7 + shifts[:, 1], minlength=49)
    assert ((counts - n / 49) ** 2 / (n / 49)).sum() < 92  # 48 degrees of freedom, probability 1e-4
    assert abs(first.mirrored.mean() - 0.5) < 4 * 0.5 / n**0.5
    others = [records(CROP, 1, 0, index, size), records(CROP, 0, 1, index, size), records(CROP, 0, 0, index + n, size)]
    others.append(records(CROP, 0, 0, index + 1, size))  # the neighbouring sample
    for other in others:
        for a, b in ((first.shifts[:, 0], other.shifts[:, 0]), (first.mirrored, other.mirrored)):
            assert abs(np.corrcoef(a, b)[0, 1]) < 4 / n**0.5
    assert abs(np.corrcoef(first.shifts[:, 1], first.mirrored)[0, 1]) < 4 / n**0.5


@given(
    st.tuples(st.integers(1, 400), st.integers(1, 400)),
    st.floats(0.01, 1.0),
    st.floats(0.1, 1.0),
    st.integers(0, 1000),
)
def test_windows_lie_in_the_image(size: tuple[int, int], scale: float, ratio: float, view: int) -> None:
    augmentation = Augmentation("resized-crop", scale=(scale, 1.0), ratio=(ratio, 1 / ratio))
    top, left, height, width = records(augmentation, 0, view, np.arange(40), np.array([size])).windows.T
    assert (top >= 0).all() and (left >= 0).all() and (height >= 1).all() and (width >= 1).all()
    assert (top + height <= size[0]).all() and (left + width <= size[1]).all()


def test_windows_have_the_configured_areas_and_ratios() -> None:
    n, H, W = 20000, 300, 400
    augmentation = Augmentation("resized-crop", scale=(0.2, 0.5))
    top, left, height, width = records(augmentation, 0, 0, np.arange(n), np.array([[H, W]])).windows.T
    area, ratio = height * width / (H * W), np.log(width / height) / np.log(4 / 3)
    for value, low, high in ((area, 0.2, 0.5), (ratio, -1, 1), (top / (H - height), 0, 1), (left / (W - width), 0, 1)):
        deciles = np.quantile(value, np.linspace(0, 1, 11))
        # Standard error of a decile of 20,000 uniform values: at most 0.0035 of the range.
        assert np.abs(deciles - np.linspace(low, high, 11)).max() <= 0.03 * (high - low)


@pytest.mark.parametrize("padding", [1, 2, 5])
def test_every_shift_occurs_and_no_other(padding: int) -> None:
    record = records(Augmentation(padding=padding), 0, 0, np.arange(4000), np.array([[8, 8]]))
    for axis in (0, 1):
        assert set(record.shifts[:, axis]) == set(range(-padding, padding + 1))
    assert len({tuple(shift) for shift in record.shifts.tolist()}) == (2 * padding + 1) ** 2


def test_a_window_a_little_smaller_than_its_image_takes_every_place() -> None:
    H, W = 6, 5
    augmentation = Augmentation("resized-crop", scale=(0.3, 1.0), ratio=(0.5, 2.0))
    top, left, height, width = records(augmentation, 0, 0, np.arange(9000), np.array([[H, W]])).windows.T
    assert {H - 1, H} < set(height) and {W - 1, W} < set(width)
    for side, start, length in ((H, top, height), (W, left, width)):
        for size in np.unique(length):
            assert set(start[length == size]) == set(range(side - size + 1)), size
    together = {tuple(place) for place in np.stack([top, left], 1)[(height == H - 1) & (width == W - 1)].tolist()}
    assert together == {(0, 0), (0, 1), (1, 0), (1, 1)}


@pytest.mark.parametrize(("H", "W"), [(10, 10), (10, 30), (30, 10)])
def test_windows_as_long_as_a_side_are_as_frequent_as_their_ratios(H: int, W: int) -> None:
    """Half of a square, of ratios from 1/2 to 2: a side above 9.5 is that of the image, for 7.4 % of the ratios."""
    augmentation = Augmentation("resized-crop", scale=(50 / (H * W), 50 / (H * W)), ratio=(0.5, 2.0))
    n = 20000
    _, _, height, width = records(augmentation, 0, 0, np.arange(n), np.array([[H, W]])).windows.T
    expected = np.log(100 / 9.5**2) / np.log(4)
    for side, length in ((H, height), (W, width)):
        if side == 10:
            assert abs((length == 10).mean() - expected) < 4 * (expected / n) ** 0.5


def test_records_are_stable() -> None:
    """Golden values: views of teacher caches, and interrupted runs, depend on them across versions."""
    size, index = np.array([[20, 30]]), np.arange(4)
    wide = Augmentation("resized-crop", scale=(0.3, 1.0), ratio=(0.4, 2.5))
    windows = records(wide, 3, 2, index, size).windows
    np.testing.assert_array_equal(windows, [[1, 6, 18, 22], [4, 12, 15, 18], [8, 1, 10, 22], [2, 5, 15, 12]])
    crops = records(Augmentation(padding=3), 3, 2, index, size)
    np.testing.assert_array_equal(crops.shifts, [[-1, 1], [1, 3], [2, -3], [0, -1]])
    np.testing.assert_array_equal(
        records(wide, 4, 2, np.arange(6), size).mirrored, [True, False, True, False, True, True]
    )


@pytest.mark.parametrize("kind", ["crop", "resized-crop"])
def test_nothing_is_mirrored_unless_it_may_be(kind: Any) -> None:
    for flip in (False, True):
        record = records(Augmentation(kind, flip=flip), 0, 0, np.arange(500), np.array([[9, 9]]))
        assert record.mirrored.any() == flip and not record.mirrored.all()


def test_a_very_long_image_gets_a_central_window_of_an_allowed_ratio() -> None:
    record = records(RESIZED, 0, 0, np.arange(50), np.array([[10, 1000]]))
    full_height = record.windows[:, 2] == 10
    assert full_height.any()
    np.testing.assert_array_equal(record.windows[full_height], [[0, 493, 10, 13]] * full_height.sum())
    np.testing.assert_array_equal(central_squares(np.array([[10, 25], [8, 3]])), [[0, 7, 10, 10], [2, 0, 3, 3]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "mixup"}, "'mixup'"),
        ({"padding": -1}, "padding must be at least 0, got -1"),
        ({"scale": (0.0, 1.0)}, r"\(0.0, 1.0\)"),
        ({"scale": (0.5, 1.5)}, r"\(0.5, 1.5\)"),
        ({"ratio": (2.0, 1.0)}, r"\(2.0, 1.0\)"),
    ],
)
def test_invalid_augmentation_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**settings)
