"""Data sets by name: Fashion-MNIST's files, held-out parts, options, fingerprints of arrays."""

from __future__ import annotations

import gzip
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from camkd_fast.data import LabelledImages, catalogue
from camkd_fast.data.fashion_mnist import DEBIAN, FILES, load_fashion_mnist, read_idx
from camkd_fast.data.fetch import default_folder
from camkd_fast.data.images import check_labels
from camkd_fast.data.splits import hold_out
from tests.support.loader_data import fashion_folder, idx

pytestmark = pytest.mark.usefixtures("own_data_folder")


@given(shape=st.lists(st.integers(0, 5), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_idx_files_of_any_shape_are_read_back(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], seed: int
) -> None:
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    path = tmp_path_factory.mktemp("idx") / "values.gz"
    path.write_bytes(gzip.compress(idx(values)))
    read = read_idx(path, len(shape))
    assert read.dtype == torch.uint8 and np.array_equal(read.numpy(), values)


def test_invalid_idx_files_are_refused_with_both_numbers(tmp_path: Path) -> None:
    path = tmp_path / "values.gz"
    values = np.random.default_rng(0).integers(0, 256, (7, 28, 28), dtype=np.uint8)

    def refuse(content: bytes, message: str) -> None:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"values\.gz.*{message}"):
            read_idx(path, 3)

    refuse(gzip.compress(idx(values)[:-28]), "holds 5460 values, its header says 7x28x28 = 5488")
    refuse(gzip.compress(idx(values) + b"\0"), "holds more than 5488 values, its header says 7x28x28 = 5488")
    refuse(gzip.compress(idx(values.reshape(7, -1))), "begins with 00000802, an IDX file of 3 dimensions with 00000803")
    refuse(gzip.compress(b"\x00\x00\x0d\x03" + idx(values)[4:]), "begins with 00000d03")
    refuse(gzip.compress(idx(values)[:10]), "ends after 10 of 16 bytes")
    refuse(gzip.compress(b""), "begins with ,")
    refuse(idx(values), "is damaged: Not a gzipped file")
    whole = gzip.compress(idx(values))
    refuse(whole[: len(whole) // 2], r"holds \d+ values, its header says 7x28x28 = 5488")
    refuse(whole[:8], "begins with ,")
    refuse(whole[:40] + bytes(200) + whole[240:], "(is damaged|holds .* values)")


def test_fashion_mnist_is_read_from_the_given_or_the_default_folder(tmp_path: Path) -> None:
    train, test = load_fashion_mnist(fashion_folder(tmp_path / "here"))
    assert train.pixels.shape == (40, 1, 28, 28) and len(test) == 10 and train.channels == 1
    fashion_folder(default_folder("fashion-mnist"), train=20)
    splits = catalogue.load("fashion-mnist", validation=0.5)
    assert [len(part) for part in splits] == [10, 10, 10]


def test_arrays_are_padded_to_a_size(tmp_path: Path) -> None:
    root = fashion_folder(tmp_path / "here")
    original, padded = (catalogue.load("fashion-mnist", root, validation=0.5, size=size) for size in (None, 33))
    for part, wider in zip(original, padded, strict=True):
        assert wider.shape == (1, 33, 33) and wider.pixels.dtype == torch.uint8  # 2 and 3 pixels of border
        assert torch.equal(wider.pixels[:, :, 2:30, 2:30], part.pixels) and torch.equal(wider.labels, part.labels)
        assert wider.pixels.sum() == part.pixels.sum() and (wider.mean, wider.std) == (part.mean, part.std)
        assert wider.fingerprint() != part.fingerprint()
    with pytest.raises(ValueError, match="28x28 pixels can be padded to no less than 28, got size 27"):
        catalogue.load("fashion-mnist", root, size=27)


def test_missing_or_invalid_fashion_mnist_is_refused(tmp_path: Path) -> None:
    root = fashion_folder(tmp_path / "here")
    labels = root / FILES[1]
    labels.write_bytes(gzip.compress(idx(np.arange(41) % 10)))
    with pytest.raises(ValueError, match=r"holds 40 images, .* holds 41 labels"):
        load_fashion_mnist(root)
    labels.write_bytes(gzip.compress(idx(np.full(40, 10))))
    with pytest.raises(ValueError, match=r"train-labels.*label 10 of image 0 lies outside \[0, 10\)"):
        load_fashion_mnist(root)
    labels.unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"train-labels.*apt-get install dataset-fashion-mnist.*camkd-fast data fetch fashion-mnist",
    ):
        load_fashion_mnist(root)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_real_fashion_mnist_as_debian_packages_it() -> None:
    train, test = load_fashion_mnist()
    assert (len(train), len(test)) == (60000, 10000)
    assert train.labels.bincount().tolist() == [6000] * 10 and test.labels.bincount().tolist() == [1000] * 10
    levels = train.pixels.double()
    assert levels.mean().item() == pytest.approx(72.94, abs=0.005)
    assert train.mean == pytest.approx((levels.mean().item(),), abs=1e-4)
    assert train.std == pytest.approx((levels.std(correction=0).item(),), abs=1e-4)
    splits = catalogue.load("fashion-mnist")
    assert [len(part) for part in splits] == [54000, 6000, 10000]
    assert splits.validation.labels.bincount().tolist() == [600] * 10


@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    fraction=st.floats(0.0, 0.99),
    seed=st.integers(0, 2**31),
)
def test_held_out_parts_are_disjoint_complete_and_stratified(counts: list[int], fraction: float, seed: int) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    total = len(labels)
    data = LabelledImages(torch.arange(total).view(-1, 1, 1, 1), labels, len(counts), (0.0,), (1.0,))
    expected = max(1, round(fraction * total)) if fraction else 0
    if expected >= total:
        with pytest.raises(ValueError, match=f"holding out {expected} of {total}"):
            hold_out(data, fraction, seed)
        return
    kept, held = hold_out(data, fraction, seed)
    assert len(held) == expected
    positions = torch.cat([kept.pixels.flatten(), held.pixels.flatten()])
    assert torch.equal(positions.sort().values, torch.arange(total))
    share = held.labels.bincount(minlength=len(counts)) - torch.tensor(counts) * expected / total
    assert share.abs().max() <= 1.5
    assert torch.equal(hold_out(data, fraction, seed)[1].pixels, held.pixels)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_invalid_fractions_are_refused(fraction: float) -> None:
    data = LabelledImages(torch.zeros(4, 1, 1, 1), torch.arange(4), 4, (0.0,), (1.0,))
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        hold_out(data, fraction, 0)


def test_digits_have_fixed_splits() -> None:
    pytest.importorskip("sklearn")
    splits = catalogue.load("digits", split_seed=3)
    assert [len(part) for part in splits] == [900, 300, 597]
    assert splits.train.shape == (1, 8, 8)
    with pytest.raises(ValueError, match=r"300 validation images.* got None, 0\.2 and None"):
        catalogue.load("digits", validation=0.2)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("cifar-10", "cifar10"), ("fashionmnist", "fashion-mnist"), ("dogs", "stanford-dogs"), ("tiny", "tiny-imagenet")],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=rf"got '{name}' \(nearest: .*{nearest}"):
        catalogue.load(name)


def test_options_that_a_set_lacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"leave out root, validation and size, got None, 0\.1 and 16"):
        catalogue.load("digits", size=16)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        catalogue.load("folder", tmp_path, size=0)
    with pytest.raises(ValueError, match="needs a root folder"):
        catalogue.load("folder")


def test_invalid_labels_are_named() -> None:
    check_labels(torch.tensor([0, 4]), 5, "here")
    with pytest.raises(ValueError, match=r"here: label 5 of image 1 lies outside \[0, 5\)"):
        check_labels(torch.tensor([0, 5, -1]), 5, "here")


def test_fingerprints_of_arrays_depend_on_everything_but_strides() -> None:
    pixels = torch.arange(48, dtype=torch.uint8).view(4, 3, 2, 2)
    data = LabelledImages(pixels, torch.tensor([0, 1, 0, 1]), 2, (1.0,) * 3, (2.0,) * 3)
    same = LabelledImages(pixels.clone(), data.labels.clone(), 2, data.mean, data.std)
    strided = LabelledImages(pixels.contiguous(memory_format=torch.channels_last), data.labels, 2, data.mean, data.std)
    assert data.fingerprint() == same.fingerprint() == strided.fingerprint() and len(data.fingerprint()) == 64
    others = [
        LabelledImages(pixels.flip(0), data.labels, 2, data.mean, data.std),
        LabelledImages(pixels, 1 - data.labels, 2, data.mean, data.std),
        LabelledImages(pixels, data.labels, 3, data.mean, data.std),
        LabelledImages(pixels, data.labels, 2, (1.5,) * 3, data.std),
        LabelledImages(pixels.view(4, 3, 1, 4), data.labels, 2, data.mean, data.std),
        data.take(torch.tensor([0, 1, 2])),
    ]
    assert len({data.fingerprint(), *(other.fingerprint() for other in others)}) == 7
