"""Images per second of the loaders, for arrays and for a folder of JPEG files.

One call is an epoch of augmented training batches; the loaders are timed in interleaved rounds. The JPEG files are
generated. On a GPU all batches end on the device: the resident loader and DALI work there, and DataLoader copies to it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from benchmarks import timer
from benchmarks.conftest import Suite
from camkd_fast.data import choose
from camkd_fast.data.augment import Augmentation
from camkd_fast.data.batch import Loader, LoaderConfig
from camkd_fast.data.files import ImageFiles, ImageSet
from camkd_fast.data.folders import load_folder
from camkd_fast.data.images import LabelledImages

pytestmark = pytest.mark.benchmark(timer=timer.CLOCK)

Kind = Literal["resident", "dali", "torch"]
ARRAYS, FILES = 20_000, 512  # images
BATCH = 64


def arrays() -> LabelledImages:
    pixels = torch.randint(256, (ARRAYS, 3, 32, 32), dtype=torch.uint8)
    return LabelledImages(pixels, torch.randint(10, (ARRAYS,)), 10, (128.0,) * 3, (64.0,) * 3)


def jpeg_folder(root: Path) -> ImageFiles:
    """Smooth random images of 320 x 256 pixels, quality 90: about 20 kB each, as photographs of that size."""
    from PIL import Image

    random = np.random.default_rng(0)
    for i in range(FILES):
        coarse = Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8))
        path = root / "train" / str(i % 4) / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize((320, 256), Image.Resampling.BICUBIC).save(path, quality=90)
        if i < 8:  # the folder layout requires a test part
            test = root / "test" / str(i % 4) / f"{i}.jpg"
            test.parent.mkdir(parents=True, exist_ok=True)
            coarse.resize((320, 256)).save(test)
    train = load_folder(root, size=224, validation=0.0, split_seed=0).train
    assert isinstance(train, ImageFiles)
    return train


def epoch_of(loader: Loader) -> Callable[[], None]:
    """A function that runs the next epoch."""
    epochs = iter(range(1_000_000))

    def run() -> None:
        loader.set_epoch(next(epochs))
        images = sum(len(batch.target) for batch in loader)
        assert images == loader.num_samples, f"the loader gave {images} images, but num_samples is {loader.num_samples}"

    return run


def measure(
    benchmark: Any, suite: Suite, title: str, images: ImageSet, kinds: tuple[Kind, ...], augmentation: Augmentation
) -> None:
    """Record one row per kind of loader. Those that cannot run here are left out, with the reason."""
    workers = torch.get_num_threads()
    config = LoaderConfig(BATCH, augmentation=augmentation, workers=workers, device=suite.device)
    with ExitStack() as stack:
        contestants = {}
        for kind in kinds:
            try:
                contestants[kind] = epoch_of(stack.enter_context(closing(choose.loader(images, config, kind))))
            except NotImplementedError as error:
                suite.note(f"left out: {error}")
        times = timer.interleaved(
            contestants, suite.device, seconds=suite.seconds(20.0), rounds=(5, 50),
            benchmark=benchmark, watch=next(iter(contestants)), wall=True,
        )  # fmt: skip
    for kind, values in times.items():
        row = {
            "images": title,
            "loader": kind,
            "images_per_second": len(images) / statistics.median(values),
            "speed_up": timer.median_ratio(times["torch"], values),
            "rounds": len(values),
        }
        suite.record(benchmark if kind == next(iter(times)) else None, row)


def test_arrays(benchmark: Any, suite: Suite) -> None:
    crop = Augmentation("crop", 4, True)
    measure(benchmark, suite, "arrays 3x32x32, crop", arrays(), ("resident", "dali", "torch"), crop)


def test_files(benchmark: Any, suite: Suite, tmp_path: Path) -> None:
    files = jpeg_folder(tmp_path)
    measure(
        benchmark, suite, "JPEG 320x256 to 224, resized crop", files, ("dali", "torch"), Augmentation("resized-crop")
    )
