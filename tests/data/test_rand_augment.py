"""RandAugment: each operation against Pillow's, the draws, and batches of mixed operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from camkd_fast.data import Augmentation
from camkd_fast.data.rand_augment import LARGEST, OPERATIONS, Draws, draws, rand_augment
from tests.support.loader_data import picture

H, W = 41, 56
Pillow = Callable[[Image.Image, float], Image.Image]  # of a signed strength, -1 to 1


def affine(coefficients: Callable[[float], tuple[float, ...]]) -> Pillow:
    def apply(image: Image.Image, s: float) -> Image.Image:
        return image.transform(image.size, Image.Transform.AFFINE, coefficients(s), Image.Resampling.NEAREST)

    return apply


def enhanced(kind: Any) -> Pillow:
    return lambda image, s: kind(image).enhance(1 + 0.9 * s)


def moved(image: Image.Image, dx: int, dy: int) -> Image.Image:
    found = Image.new("RGB", image.size)
    found.paste(image, (dx, dy))
    return found


# Operation -> Pillow's, and the share of pixels that may differ: positions between two pixels, rounding of levels.
PILLOW: dict[str, tuple[Pillow, float]] = {
    "shear-x": (affine(lambda s: (1, 0.3 * s, 0, 0, 1, 0)), 0.01),
    "shear-y": (affine(lambda s: (1, 0, 0, 0.3 * s, 1, 0)), 0.01),
    "translate-x": (lambda image, s: moved(image, -int(s * 150 / 331 * W), 0), 0.0),
    "translate-y": (lambda image, s: moved(image, 0, -int(s * 150 / 331 * H)), 0.0),
    "rotate": (lambda image, s: image.rotate(-30 * s, Image.Resampling.NEAREST), 0.03),
    "brightness": (enhanced(ImageEnhance.Brightness), 0.0),
    "color": (enhanced(ImageEnhance.Color), 0.001),
    "contrast": (enhanced(ImageEnhance.Contrast), 0.0),
    "sharpness": (enhanced(ImageEnhance.Sharpness), 0.0),
    "posterize": (lambda image, s: ImageOps.posterize(image, 8 - round(4 * abs(s))), 0.0),
    "solarize": (lambda image, s: ImageOps.solarize(image, 255 * (1 - abs(s))), 0.0),
    "autocontrast": (lambda image, s: ImageOps.autocontrast(image), 0.0),
    "equalize": (lambda image, s: ImageOps.equalize(image), 0.0),
    "identity": (lambda image, s: image, 0.0),
}
ROUNDED = ("brightness", "color", "contrast", "sharpness", "autocontrast")  # Pillow truncates some of these levels


def pictures(count: int = 3) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    dark = picture(generator, H, W).point(lambda level: 40 + level // 3)  # not all levels: something to stretch
    return [dark, *(picture(generator, H, W) for _ in range(count - 1))]


def levels_of(images: list[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()


def only(name: str, n: int, sign: float = 1.0) -> Draws:
    return Draws(np.full((n, 1), OPERATIONS.index(name)), np.full((n, 1), sign))


@pytest.mark.parametrize("magnitude", [0, 9, 30])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_pillows(name: str, sign: float, magnitude: int) -> None:
    images = pictures()
    before = levels_of(images)
    found = rand_augment(before, only(name, 3, sign), magnitude)
    pillow, share = PILLOW[name]
    expected = levels_of([pillow(image, sign * magnitude / LARGEST) for image in images])
    difference = (found.int() - expected.int()).abs()
    assert (difference > (1 if name in ROUNDED else 0)).float().mean() <= share
    assert torch.equal(before, levels_of(images)) and found.dtype == torch.uint8
    always = ("autocontrast", "equalize", "solarize")  # solarize: the largest level
    changes = name != "identity" and (magnitude > 0 or name in always)
    assert torch.equal(found, before) != changes


def test_all_operations_are_tested() -> None:
    assert set(PILLOW) == set(OPERATIONS) and len(OPERATIONS) == 14


@pytest.mark.parametrize("name", OPERATIONS)
def test_grey_and_tiny_images(name: str) -> None:
    """One channel; one level; fewer than three pixels."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 1, 9, 7), (2, 3, 2, 5), (2, 3, 1, 1)):
        levels = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        flat = torch.full(shape, 77, dtype=torch.uint8)
        for given_levels in (levels, flat):
            found = rand_augment(given_levels, only(name, 2), 15)
            assert found.shape == shape
            if name in ("color", "contrast", "sharpness", "autocontrast", "equalize", "identity"):
                assert torch.equal(rand_augment(flat, only(name, 2), 15), flat)
    grey = torch.randint(256, (2, 1, 9, 7), generator=generator, dtype=torch.uint8)
    colored = rand_augment(grey.expand(-1, 3, -1, -1).contiguous(), only(name, 2), 12)
    assert (colored - colored[:, :1]).abs().max() <= 1 or name == "color"
    assert (colored[:, :1].int() - rand_augment(grey, only(name, 2), 12).int()).abs().max() <= 1


@settings(max_examples=25)
@given(st.integers(1, 3), st.integers(0, LARGEST), st.integers(0, 10**6), st.permutations(list(range(12))))
def test_an_image_does_not_depend_on_its_batch(rounds: int, magnitude: int, seed: int, order: list[int]) -> None:
    levels = levels_of([picture(np.random.default_rng(n), 12, 10) for n in range(12)])
    index = np.arange(100, 112)
    together = rand_augment(levels, draws(rounds, seed, 4, index), magnitude)
    shuffled = rand_augment(levels[order], draws(rounds, seed, 4, index[order]), magnitude)
    assert torch.equal(together[order], shuffled)
    drawn = draws(rounds, seed, 4, index)
    for n in (0, 7):
        single = levels[n : n + 1]
        for operation, sign in zip(drawn.operations[n], drawn.signs[n], strict=True):
            single = rand_augment(single, Draws(np.array([[operation]]), np.array([[sign]])), magnitude)
        assert torch.equal(together[n : n + 1], single)


def test_draws_are_uniform_and_of_their_view() -> None:
    n = 20000
    drawn = draws(2, 0, 0, np.arange(n))
    for operations in drawn.operations.T:
        counts = np.bincount(operations, minlength=14)
        assert ((counts - n / 14) ** 2 / (n / 14)).sum() < 44  # 13 degrees of freedom, probability 3e-5
    assert abs(drawn.signs.mean()) < 4 / n**0.5
    for other in (draws(2, 1, 0, np.arange(n)), draws(2, 0, 1, np.arange(n)), draws(2, 0, 0, np.arange(n) + n)):
        assert abs(np.corrcoef(drawn.operations[:, 0], other.operations[:, 0])[0, 1]) < 4 / n**0.5
    assert abs(np.corrcoef(drawn.operations.T)[0, 1]) < 4 / n**0.5
    few = draws(2, 3, 2, np.arange(4))
    assert few.operations.tolist() == [[9, 4], [3, 2], [2, 13], [8, 4]]  # views of caches depend on them
    assert few.signs.tolist() == [[1, -1], [-1, 1], [-1, 1], [-1, -1]]


def test_an_unused_setting_leaves_the_text_as_it_was() -> None:
    """The text is part of checkpoints and caches of earlier versions."""
    text = "Augmentation(kind='crop', padding=4, flip=True, scale=(0.08, 1.0), ratio=(0.75, 1.3333333333333333)"
    assert str(Augmentation()) == f"{text})"
    used = Augmentation(rand_augment=(2, 9), erasing=0.25)
    assert str(used) == f"{text}, rand_augment=(2, 9), erasing=0.25)"


@pytest.mark.parametrize("numbers", [(0, 9), (2, 31), (2, -1)])
def test_refused(numbers: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"0 to 30, got {numbers[0]} of {numbers[1]}"):
        Augmentation(rand_augment=numbers)
