"""`make bench-train`: a distillation step, loader included, against an eager loop as in the official code.

Three ResNet-32x4 teach a VGG-8 by the whole of CA-MKD (logits and features) on 100 classes of 3x32x32 images, batch 64.
Images and weights are random: only time is measured. Every ratio is a median over rounds in which all ran in turn.
Writes benchmarks/results/<device>/train_step.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import environment, timer
from benchmarks.official_loop import OfficialStep
from camkd_fast import camkd_loss_and_grad, models
from camkd_fast.data import choose
from camkd_fast.data.augment import Augmentation
from camkd_fast.data.batch import Batch, Loader, LoaderConfig
from camkd_fast.data.images import LabelledImages
from camkd_fast.models.protocol import feature_model
from camkd_fast.train import strategies
from camkd_fast.train.cache import CachedTeachers, CacheKey, Storage, TeacherCache
from camkd_fast.train.config import OptimConfig, PrecisionConfig
from camkd_fast.train.distributed import World
from camkd_fast.train.step import DTYPES, TrainStep
from camkd_fast.train.teachers import LiveTeachers, Teachers

TEACHER, STUDENT, K, CLASSES, BATCH, IMAGES = "resnet32x4", "vgg8", 3, 100, 64, 640
WORLD = World(0, 1, torch.device("cpu"))
AUGMENTATION = Augmentation("crop", 4, True)


@dataclass(frozen=True)
class Setting:
    """One way to run our step."""

    name: str
    precision: PrecisionConfig
    cached: bool = False


SETTINGS = [
    Setting("float32", PrecisionConfig()),
    Setting("bfloat16", PrecisionConfig(dtype="bfloat16", channels_last=True)),
    Setting("bfloat16, compiled", PrecisionConfig(dtype="bfloat16", channels_last=True, compile="on")),
    Setting("float32, teacher cache", PrecisionConfig(), cached=True),
    Setting(
        "bfloat16, compiled, teacher cache",
        PrecisionConfig(dtype="bfloat16", channels_last=True, compile="on"),
        cached=True,
    ),
]


def random_images() -> LabelledImages:
    pixels = torch.randint(256, (IMAGES, 3, 32, 32), dtype=torch.uint8)
    return LabelledImages(pixels, torch.randint(CLASSES, (IMAGES,)), CLASSES, (128.0,) * 3, (64.0,) * 3)


def endless(loader: Loader) -> Iterator[Batch]:
    epoch = 0
    while True:
        loader.set_epoch(epoch)
        yield from loader
        epoch += 1


def our_step(setting: Setting, images: LabelledImages, folder: Path) -> tuple[Callable[[], None], float]:
    """The step on the next batch, and how long its first two calls took (compilation)."""
    precision = setting.precision
    config = LoaderConfig(
        BATCH, augmentation=AUGMENTATION, views=1 if setting.cached else None, channels_last=precision.channels_last
    )
    dtype = None if precision.dtype == "float32" else DTYPES[precision.dtype]
    trained = [models.create(TEACHER, CLASSES) for _ in range(K)]
    live = LiveTeachers([models.freeze(t, dtype, precision.channels_last) for t in trained], CLASSES)
    teachers: Teachers = live
    if setting.cached:
        key = CacheKey.of(images, "train", config, "resident", live)
        loader = choose.loader(images, config, "resident")
        teachers = CachedTeachers(TeacherCache.build(folder, live, loader, key, Storage(), world=WORLD), live.heads)
    elif precision.compile == "on":
        live.compile_for(BATCH)
    student = models.create(STUDENT, CLASSES)
    strategy = strategies.create("ca-mkd", teachers, feature_model(student).num_features)
    step = TrainStep(student, strategy, teachers, OptimConfig(epochs=1), precision, WORLD, BATCH, seed=0)
    step.pupil.train()
    batches = endless(choose.loader(images, config, "resident"))
    number = 0

    def run() -> None:
        nonlocal number
        step(next(batches), BATCH, 0.05, number)
        number += 1

    started = time.perf_counter()
    run()
    run()
    return run, time.perf_counter() - started


def loss_seconds() -> float:
    """Median of the fused loss and its gradient at this step's shape."""
    student, *teachers = torch.randn(K + 1, BATCH, CLASSES).unbind()
    target = torch.randint(CLASSES, (BATCH,))
    call = {"loss": lambda: camkd_loss_and_grad(student, teachers, target)}
    return statistics.median(timer.interleaved(call, seconds=1)["loss"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=120.0, help="time for all rounds (default: 120)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    where = environment.describe()
    print(
        f"{where['processor']}, {where['instruction set']}, {where['threads']} threads, torch {where['torch']}, ",
        end="",
    )
    print(f"commit {where['commit']}\n{K} x {TEACHER} -> {STUDENT}, batch {BATCH}, 3x32x32, {CLASSES} classes, CA-MKD")
    images = random_images()
    contestants: dict[str, Callable[[], object]] = {
        "official-style eager loop": OfficialStep(
            images,
            models.create(STUDENT, CLASSES),
            [models.create(TEACHER, CLASSES) for _ in range(K)],
            BATCH,
            workers=torch.get_num_threads(),
        )
    }
    first: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, setting in enumerate(SETTINGS):
            contestants[setting.name], first[setting.name] = our_step(setting, images, Path(folder) / str(i))
        times = timer.interleaved(contestants, seconds=arguments.seconds, rounds=(7, 100))
    loss = loss_seconds()
    baseline = next(iter(times))
    print(f"\n{'':<34} {'ms':>8} {'images/s':>9} {'speed-up':>9} {'loss share':>11} {'first steps':>12}")
    rows = []
    for name, values in times.items():
        middle = statistics.median(values)
        ours = name != baseline
        row = {
            "name": name,
            **timer.percentiles(values),
            "images_per_second": BATCH / middle,
            "speed_up": timer.median_ratio(times[baseline], values),
            "loss_share": loss / middle if ours else None,
            "first_two_steps_seconds": first.get(name),
            "rounds": len(values),
        }
        rows.append(row)
        share, start = (f"{loss / middle:.2%}", f"{first[name]:.1f} s") if ours else ("", "")
        print(f"{name:<34} {1e3 * middle:8.1f} {BATCH / middle:9.1f} {row['speed_up']:8.2f}x {share:>11} {start:>12}")
    path = environment.results_folder() / "train_step.json"
    setting = {"teachers": [TEACHER] * K, "student": STUDENT, "batch": BATCH, "classes": CLASSES, "strategy": "ca-mkd"}
    result = {"environment": where, "setting": setting, "loss_ms": 1e3 * loss, "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path.relative_to(environment.RESULTS.parent.parent)}")


if __name__ == "__main__":
    main()
