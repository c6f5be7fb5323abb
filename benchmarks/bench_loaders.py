"""Second half of `make bench-train`: images per second of the loaders, for arrays and for a folder of JPEG files.

One call is an epoch of augmented training batches; all loaders run in turn. The JPEG files are generated.
Writes benchmarks/results/<device>/loaders.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from benchmarks import environment, timer
from camkd_fast.data import choose
from camkd_fast.data.augment import Augmentation
from camkd_fast.data.batch import Loader, LoaderConfig
from camkd_fast.data.files import ImageFiles, ImageSet
from camkd_fast.data.folders import load_folder
from camkd_fast.data.images import LabelledImages

Kind = Literal["resident", "dali", "torch"]
ARRAYS, FILES = 20_000, 512  # images
BATCH = 64


def arrays() -> LabelledImages:
    pixels = torch.randint(256, (ARRAYS, 3, 32, 32), dtype=torch.uint8)
    return LabelledImages(pixels, torch.randint(10, (ARRAYS,)), 10, (128.0,) * 3, (64.0,) * 3)


def jpeg_folder(root: Path) -> ImageFiles:
    """Smooth random images of 320 x 256 pixels, quality 90: about 20 kB each, like photographs of that size."""
    from PIL import Image

    random = np.random.default_rng(0)
    for i in range(FILES):
        coarse = Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8))
        path = root / "train" / str(i % 4) / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize((320, 256), Image.Resampling.BICUBIC).save(path, quality=90)
        if i < 8:  # a test part, which the folder layout asks for
            test = root / "test" / str(i % 4) / f"{i}.jpg"
            test.parent.mkdir(parents=True, exist_ok=True)
            coarse.resize((320, 256)).save(test)
    train = load_folder(root, size=224, validation=0.0, split_seed=0).train
    assert isinstance(train, ImageFiles)
    return train


def epoch_of(loader: Loader) -> Callable[[], None]:
    """Runs the next epoch."""
    epochs = iter(range(1_000_000))

    def run() -> None:
        loader.set_epoch(next(epochs))
        images = sum(len(batch.target) for batch in loader)
        assert images == loader.num_samples, f"{images} images came, {loader.num_samples} were promised"

    return run


def measure(
    title: str, images: ImageSet, kinds: tuple[Kind, ...], augmentation: Augmentation, seconds: float
) -> list[dict[str, object]]:
    with ExitStack() as stack:
        contestants = {}
        for kind in kinds:
            config = LoaderConfig(BATCH, augmentation=augmentation, workers=torch.get_num_threads())
            contestants[kind] = epoch_of(stack.enter_context(closing(choose.loader(images, config, kind))))
        times = timer.interleaved(contestants, seconds=seconds, rounds=(5, 50))
    rows = []
    for kind, values in times.items():
        rate = len(images) / statistics.median(values)
        over = timer.median_ratio(times["torch"], values)
        rows.append(
            {"images": title, "loader": kind, "images_per_second": rate, "speed_up": over, "rounds": len(values)}
        )
        print(f"{title:<34} {kind:<9} {rate:12,.0f} {over:8.2f}x", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=20.0, help="time per kind of images (default: 20)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    where = environment.describe()
    print(f"{where['processor']}, {where['threads']} threads, commit {where['commit']}, batch {BATCH}")
    print(f"{'images':<34} {'loader':<9} {'images/s':>12} {'over torch':>9}")
    crop = Augmentation("crop", 4, True)
    rows = measure("arrays 3x32x32, crop", arrays(), ("resident", "dali", "torch"), crop, arguments.seconds)
    with tempfile.TemporaryDirectory() as folder:
        files = jpeg_folder(Path(folder))
        rows += measure(
            "JPEG 320x256 to 224, resized crop",
            files,
            ("dali", "torch"),
            Augmentation("resized-crop"),
            arguments.seconds,
        )
    path = environment.results_folder() / "loaders.json"
    path.write_text(json.dumps({"environment": where, "rows": rows}, indent=1) + "\n")
    print(f"written to {path.relative_to(environment.RESULTS.parent.parent)}")


if __name__ == "__main__":
    main()
