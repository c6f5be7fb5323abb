"""Teachers of another normalisation, size and number of channels behind the student's batch."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from camkd_fast import models
from camkd_fast.models.preprocessing import Adapted, Preprocessing, adapted, input_channels
from camkd_fast.models.protocol import predict
from camkd_fast.train.teachers.live import LiveTeachers
from camkd_fast.train.teachers.teacher_hash import state_hash
from tests.support.tolerance import assert_accurate

pytestmark = pytest.mark.usefixtures("one_thread")

CIFAR = Preprocessing((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), (8, 8), 3)
IMAGENET = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (8, 8), 3)
GRAY = Preprocessing((0.3,), (0.2,), (8, 8), 1)


class Recorder(nn.Module):
    """Follows the protocol and keeps the images that it received."""

    num_features, num_classes = 3, 3

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 3, 1)
        self.seen = torch.empty(0)

    def forward_features(self, x: Tensor) -> Tensor:
        self.seen = x
        return self.conv(x)

    def forward_head(self, features: Tensor) -> Tensor:
        return features.mean((2, 3))


def levels(channels: int = 3, H: int = 8, W: int = 8, N: int = 2) -> Tensor:
    return torch.randint(256, (N, channels, H, W), dtype=torch.uint8)


def normalised(u: Tensor, how: Preprocessing, dtype: torch.dtype = torch.float64) -> Tensor:
    assert how.mean is not None and how.std is not None
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, -1, 1, 1) for v in (how.mean, how.std))
    return ((u.double() / 255 - mean) / std).to(dtype)


def naive(images: Tensor, own: Preprocessing, given: Preprocessing) -> Tensor:
    """In PyTorch operations: back to levels, resized, then as the teacher has them."""
    (m, s), (M, S) = (
        (torch.tensor(v).view(1, -1, 1, 1) for v in (how.mean or (0.0,), how.std or (1.0,))) for how in (given, own)
    )
    x = images * s + m
    if own.size is not None and own.size != x.shape[-2:]:
        x = F.interpolate(x, own.size, mode="bilinear", antialias=True)
    return (x - M) / S


def received(model: nn.Module, images: Tensor) -> Tensor:
    predict(model, images)
    return next(m for m in model.modules() if isinstance(m, Recorder)).seen


@pytest.mark.parametrize(
    ("own", "given"),
    [
        (IMAGENET, CIFAR),
        (CIFAR, IMAGENET),
        (Preprocessing((0.5,), (0.5,)), CIFAR),  # one number for all channels
        (CIFAR, Preprocessing((0.5,), (0.25,), channels=3)),
        (Preprocessing((0.0,), (1.0,)), IMAGENET),
        (CIFAR, Preprocessing(CIFAR.mean, (0.2675, 0.2565, 0.27))),
    ],
)
def test_the_affine_is_the_models_own_normalisation(own: Preprocessing, given: Preprocessing) -> None:
    u = levels()
    model = adapted(Recorder(), own, given)
    images = normalised(u, given, torch.float32)
    assert_accurate(received(model, images), normalised(u, own), naive(images, own, given))


@pytest.mark.parametrize(
    ("own", "given"),
    [
        (CIFAR, CIFAR),
        (Preprocessing(), CIFAR),
        (CIFAR, Preprocessing(size=(8, 8))),
        (Preprocessing(size=(8, 8)), CIFAR),
        (Preprocessing(tuple(level * 255 / 255 for level in (0.485, 0.456, 0.406)), IMAGENET.std), IMAGENET),
        (Preprocessing((0.5,), (0.25,)), Preprocessing((0.5,) * 3, (0.25,) * 3)),
    ],
)
def test_equal_or_unknown_preprocessing_adds_nothing(own: Preprocessing, given: Preprocessing) -> None:
    model = Recorder()
    assert adapted(model, own, given) is model


SIDES = st.tuples(st.integers(1, 20), st.integers(1, 20))


@settings(max_examples=50)
@given(SIDES, SIDES, st.booleans(), st.integers(0, 2**32))
def test_resizing_commutes_with_the_affine(own: tuple[int, int], here: tuple[int, int], gray: bool, seed: int) -> None:
    """To any size from any size, from one channel or from three."""
    torch.manual_seed(seed)
    u = levels(1 if gray else 3, *here)
    there, here_as = Preprocessing(IMAGENET.mean, IMAGENET.std, own), replace(GRAY if gray else CIFAR, size=here)
    images = normalised(u, here_as, torch.float32)
    resized = u.double() if own == here else F.interpolate(u.double(), own, mode="bilinear", antialias=True)
    seen = received(adapted(Recorder(), there, here_as), images)
    assert_accurate(seen, normalised(resized, there), naive(images, there, here_as), floor=1e-7)


def test_a_size_that_is_not_given_is_that_of_the_images() -> None:
    model = adapted(Recorder(), Preprocessing(size=(6, 6)), Preprocessing())
    for side in (6, 9):
        assert received(model, torch.randn(2, 3, side, side)).shape == (2, 3, 6, 6)


def test_resizing_is_that_of_image_libraries() -> None:
    """To one level: libraries round to levels, this does not."""
    image = pytest.importorskip("PIL.Image")
    u = levels(3, 24, 20, N=1)
    for side in ((8, 6), (30, 44)):
        model = adapted(Recorder(), Preprocessing((0.0,), (1.0,), side), Preprocessing((0.0,), (1.0,), (24, 20)))
        there = image.fromarray(u[0].permute(1, 2, 0).numpy()).resize(side[::-1], image.Resampling.BILINEAR)
        expected = torch.tensor(list(there.tobytes())).view(*side, 3).permute(2, 0, 1)
        assert (255 * received(model, u.float() / 255)[0] - expected).abs().max() <= 1.0


def test_gray_images_are_repeated_for_colour_models() -> None:
    u = levels(1)
    for own in (Preprocessing(), Preprocessing((0.3,), (0.2,)), CIFAR, Preprocessing(CIFAR.mean, CIFAR.std, (12, 12))):
        images = normalised(u, GRAY, torch.float32)
        seen = received(adapted(Recorder(), own, GRAY), images)
        size = own.size or (8, 8)
        assert seen.shape == (2, 3, *size)
        known = own if own.mean is not None else GRAY
        pixels = u.double() if size == (8, 8) else F.interpolate(u.double(), size, mode="bilinear", antialias=True)
        truth = normalised(pixels, known).expand(2, 3, *size)
        assert_accurate(seen, truth, naive(images, known, GRAY).expand(2, 3, *size))


@pytest.mark.parametrize(("channels", "given"), [(1, CIFAR), (4, CIFAR), (2, GRAY), (4, GRAY)])
def test_other_numbers_of_channels_are_refused(channels: int, given: Preprocessing) -> None:
    with pytest.raises(ValueError, match=f"it takes images of {channels} channels, but they have {given.channels}$"):
        adapted(Recorder(channels), Preprocessing(channels=channels), given)


def test_channels_are_those_of_a_first_convolution_of_images() -> None:
    assert [input_channels(Recorder(n)) for n in (1, 3, 2, 64)] == [1, 3, None, None]
    assert input_channels(nn.Linear(3, 3)) is None
    with pytest.raises(ValueError, match=r"it takes images of 1 channels, but they have 3$"):
        adapted(Recorder(1), Preprocessing(), CIFAR)
    inner = Recorder(64)  # defined before the first convolution that runs, perhaps
    assert adapted(inner, Preprocessing(), CIFAR) is inner


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mean": (0.5,)}, r"mean \(0.5,\) and std None"),
        ({"mean": (0.5,), "std": (0.1, 0.1)}, "mean has 1 channels, but std 2"),
        ({"mean": (0.5,), "std": (0.0,)}, r"std must be positive, got \(0.0,\)"),
        ({"mean": (0.5,) * 3, "std": (1.0,) * 3, "channels": 1}, "mean has 3 channels, but the images 1"),
    ],
)
def test_invalid_preprocessing_is_refused(settings: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Preprocessing(**settings)


def test_the_protocol_is_kept() -> None:
    model = models.create("resnet8", 5).eval()
    made = adapted(model, Preprocessing(IMAGENET.mean, IMAGENET.std, (16, 16)), CIFAR)
    images = torch.randn(2, 3, 8, 8)
    features, logits = predict(made, images)
    assert (made.num_features, made.num_classes, made.training) == (model.num_features, 5, False)
    assert features.shape == (2, 64, 4, 4) and torch.equal(logits, made(images)) and logits.shape == (2, 5)
    assert input_channels(made) == 3
    assert torch.equal(made.forward_head(features), model.forward_head(features))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_images_of_half_precision_teachers_are_rounded_last(dtype: torch.dtype) -> None:
    frozen = models.freeze(Recorder(), dtype)
    made = adapted(frozen, IMAGENET, CIFAR)
    u = levels()
    images = normalised(u, CIFAR, torch.float32)
    (prediction,) = LiveTeachers([made], 3).outputs(images)
    assert prediction.logits.dtype == dtype and frozen.seen.dtype == dtype
    truth = normalised(u, IMAGENET)
    assert_accurate(frozen.seen, truth, truth.float())
    later = adapted(Recorder(), IMAGENET, CIFAR).to(dtype)
    assert torch.equal(received(later, images), frozen.seen)


def test_the_preprocessing_is_part_of_the_hash() -> None:
    model = models.create("resnet8", 5).eval()
    kinds = [
        *(model, adapted(model, IMAGENET, CIFAR), adapted(model, CIFAR, IMAGENET)),
        *(adapted(model, Preprocessing(size=(size, 9)), CIFAR) for size in (9, 10)),
    ]
    assert len({state_hash(kind) for kind in kinds}) == len(kinds)
    assert state_hash(kinds[1]) == state_hash(adapted(model, IMAGENET, CIFAR)) == state_hash(copy.deepcopy(kinds[1]))


def test_memory_formats_and_compilation() -> None:
    made = adapted(
        models.freeze(Recorder(), channels_last=True), Preprocessing(IMAGENET.mean, IMAGENET.std, (12, 12)), CIFAR
    )
    images = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    assert made.before(images).is_contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(lambda x: predict(made, x).logits, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.no_grad():
        eager = made(images)
        assert (compiled(images) - eager).norm() <= 1e-5 * eager.norm()


def test_it_moves_with_the_module() -> None:
    made = adapted(Recorder(), IMAGENET, CIFAR)
    assert isinstance(made, Adapted)
    moved = copy.deepcopy(made).to("meta")
    assert moved.scale.device.type == "meta" and moved.shift.device.type == "meta"
    half = copy.deepcopy(made).half()
    assert half.scale.dtype == torch.float32 and torch.equal(half.scale, made.scale) and half.dtype == torch.float16
