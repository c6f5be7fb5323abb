"""Damaged image files: named, skipped and counted, by DALI and by the DataLoader."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import islice
from typing import Any

import nvidia.dali  # noqa: F401  # `make install` installs it: without it these tests fail rather than skip
import pytest
import torch

from camkd_fast.data import Augmentation, BadImageError, ImageFiles
from tests.support.loader_data import CROP, RESIZED, assert_same, by_sample, opened

kinds = pytest.mark.parametrize("kind", ["dali", "torch"])
augmentations = pytest.mark.parametrize("augmentation", [None, CROP, RESIZED], ids=["none", "crop", "resized-crop"])


def damaged(files: ImageFiles, position: int, damage: str) -> ImageFiles:
    """The same files, one of them damaged."""
    path = files.paths[position]
    content = path.read_bytes()
    broken = path.with_name(f"broken-{damage}{path.suffix}")
    if damage != "missing":
        contents = {"half": content[: len(content) // 2], "header": content[:60], "empty": b"", "text": b"no image"}
        # Truncated in the last lines, outside many random windows.
        contents["end"] = content[:-20]
        # Complete by its header and its end.
        contents["middle"] = content[: len(content) // 2] + bytes(100) + content[len(content) // 2 + 100 :]
        broken.write_bytes(contents[damage])
    paths = list(files.paths)
    paths[position] = broken
    return replace(files, paths=tuple(paths))


@kinds
@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        *((suffix, damage) for suffix in (".jpg", ".png") for damage in ("half", "header", "empty", "text", "missing")),
        (".png", "middle"),
        (".jpg", "end"),  # Pillow reads a PNG that lacks only its end, no pixel
    ],
)
@augmentations
def test_an_unreadable_file_is_named(
    kind: str, suffix: str, damage: str, augmentation: Augmentation | None, files: ImageFiles
) -> None:
    position = next(n for n, path in enumerate(files.paths) if path.suffix == suffix and n > 10)
    data = damaged(files, position, damage)
    with opened(data, kind, 8, augmentation=augmentation) as loader:
        with pytest.raises(
            BadImageError, match=rf"broken-{damage}\{suffix} cannot be read as an image: \w.*skip_bad=0"
        ) as caught:
            list(loader)
        assert "\n" not in str(caught.value)


@kinds
def test_some_unreadable_files_are_skipped_counted_and_logged(
    kind: str, files: ImageFiles, caplog: pytest.LogCaptureFixture
) -> None:
    data = damaged(damaged(damaged(files, 3, "half"), 4, "text"), 13, "end")
    good = torch.tensor([n for n in range(36) if n not in (3, 4, 13)])
    with opened(data, kind, 8, augmentation=CROP, skip_bad=3) as loader, caplog.at_level(logging.WARNING):
        for _ in range(2):
            batches = list(loader)
            assert all(torch.equal(batch.target, data.labels[batch.index]) for batch in batches)
            index, images = by_sample(batches)
            assert torch.equal(index, good)
            assert sum(len(batch.target) for batch in batches) == len(images) == 33
            assert len(batches) == len(loader)
        state = loader.state_dict()
    with opened(files, kind, 8, augmentation=CROP) as whole:
        assert torch.equal(images, by_sample(whole)[1][good])  # the readable images do not change
    assert state["bad"] == [3, 4, 13]
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("camkd_fast")]
    assert len(warnings) == 3  # once per file, not every epoch
    for name in ("broken-half", "broken-text", "broken-end"):
        assert sum(name in line for line in warnings) == 1
    assert "(3 of skip_bad=3)" in warnings[2]

    with (
        opened(data, kind, 8, augmentation=CROP, skip_bad=2) as loader,
        pytest.raises(BadImageError, match=r"broken-.*skip_bad=2"),
    ):
        list(loader)


@kinds
def test_resumed_with_unreadable_files_equals_uninterrupted(kind: str, files: ImageFiles) -> None:
    data = damaged(damaged(files, 3, "half"), 9, "middle")  # found by its header, and while decoding
    settings: dict[str, Any] = {"batch_size": 8, "augmentation": CROP, "skip_bad": 2}
    with opened(data, kind, **settings) as whole:
        expected = list(whole)
    with opened(data, kind, **settings) as part, opened(data, kind, **settings) as resumed:
        seen = list(islice(part, 2))
        resumed.load_state_dict(part.state_dict())
        assert_same(seen + list(resumed), expected)


@kinds
def test_a_batch_without_a_readable_image_is_an_error(kind: str, files: ImageFiles) -> None:
    data = files.take(torch.arange(4))
    for position in range(4):
        data = damaged(data, position, "text")
    message = r"no image of a batch of 4 can be read, the first is .*broken-text"
    with opened(data, kind, 4, skip_bad=9) as loader, pytest.raises(BadImageError, match=message):
        list(loader)


@kinds
def test_a_loader_can_be_used_after_an_error(kind: str, files: ImageFiles) -> None:
    data = damaged(files, 9, "middle")
    with opened(data, kind, 8) as loader:
        for _ in range(2):
            with pytest.raises(BadImageError, match="broken-middle"):
                list(loader)
        loader.set_epoch(1)
        assert next(iter(loader)).index.tolist() == list(range(8))
