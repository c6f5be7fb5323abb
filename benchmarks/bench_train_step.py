"""A distillation step, loader included, against an eager loop written like the official code.

Three ResNet-32x4 teach a VGG-8 with CA-MKD (logits and features) on 100 classes of 3x32x32 images, batch 64. Images and
parameters are random, because only time is measured. Every ratio is a median over interleaved rounds. On a GPU a round
is a block of steps without a wait in between, as in training; beside it stands a single step that is waited for.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import profiler, timer
from benchmarks.conftest import Suite
from benchmarks.official_loop import OfficialStep
from camkd_fast import camkd_loss_and_grad, models
from camkd_fast.data import choose
from camkd_fast.data.augment import Augmentation
from camkd_fast.data.batch import Batch, Loader, LoaderConfig
from camkd_fast.data.images import LabelledImages
from camkd_fast.models.protocol import feature_model
from camkd_fast.train import strategies
from camkd_fast.train.config import OptimConfig, PrecisionConfig
from camkd_fast.train.distributed import World
from camkd_fast.train.step import DTYPES, TrainStep
from camkd_fast.train.teacher_ahead import with_following
from camkd_fast.train.teachers.cache import CachedTeachers, CacheKey, Storage, TeacherCache
from camkd_fast.train.teachers.live import LiveTeachers, Teachers

pytestmark = [pytest.mark.benchmark(timer=timer.CLOCK), pytest.mark.timeout(1800)]

TEACHER, STUDENT, K, CLASSES, BATCH = "resnet32x4", "vgg8", 3, 100, 64
IMAGES = {"cpu": 640, "cuda": 12_800}  # loaders restart every 10 or 200 steps
BLOCK = {"cpu": 1, "cuda": 20}  # steps of a round
AUGMENTATION = Augmentation("crop", 4, True)


@dataclass(frozen=True)
class Setting:
    """One configuration of our step."""

    name: str
    precision: PrecisionConfig
    cached: bool = False
    quick: bool = False  # measured with --shapes quick too


FLOAT32 = PrecisionConfig(compile="off", cuda_graphs="off")
BFLOAT16 = replace(FLOAT32, dtype="bfloat16", channels_last=True)
COMPILED = replace(BFLOAT16, compile="on")
SETTINGS = {
    "cpu": [
        Setting("float32", FLOAT32),
        Setting("bfloat16", BFLOAT16),
        Setting("bfloat16, teachers compiled", replace(BFLOAT16, compile="teachers")),
        Setting("bfloat16, compiled", COMPILED),
        Setting("float32, teacher cache", FLOAT32, cached=True),
        Setting("bfloat16, teacher cache", BFLOAT16, cached=True),
        Setting("bfloat16, compiled, teacher cache", COMPILED, cached=True),
    ],
    "cuda": [
        Setting("float32", FLOAT32),
        Setting("float32, graph", replace(FLOAT32, cuda_graphs="on"), quick=True),
        Setting("float32, compiled, graph", replace(FLOAT32, compile="on", cuda_graphs="on")),
        Setting("bfloat16", BFLOAT16),
        Setting("bfloat16, graph", replace(BFLOAT16, cuda_graphs="on"), quick=True),
        Setting(
            "bfloat16, graph, teachers first", replace(BFLOAT16, cuda_graphs="on", teacher_ahead="off"), quick=True
        ),
        Setting("bfloat16, compiled", COMPILED),
        Setting("bfloat16, compiled, graph", replace(COMPILED, cuda_graphs="on"), quick=True),
        Setting("float32, teacher cache, graph", replace(FLOAT32, cuda_graphs="on"), cached=True),
        Setting("bfloat16, teacher cache, graph", replace(BFLOAT16, cuda_graphs="on"), cached=True, quick=True),
        Setting(
            "bfloat16, compiled, teacher cache, graph", replace(COMPILED, cuda_graphs="on"), cached=True, quick=True
        ),
    ],
}


def chosen_settings(device: str, shapes: str) -> list[Setting]:
    """With "quick" only those that are marked, where some are."""
    every = SETTINGS[device]
    return [setting for setting in every if setting.quick or shapes != "quick"] or every


def random_images(count: int) -> LabelledImages:
    pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
    return LabelledImages(pixels, torch.randint(CLASSES, (count,)), CLASSES, (128.0,) * 3, (64.0,) * 3)


def endless(loader: Loader) -> Iterator[Batch]:
    epoch = 0
    while True:
        loader.set_epoch(epoch)
        yield from loader
        epoch += 1


def our_step(
    setting: Setting, images: LabelledImages, folder: Path, device: torch.device
) -> tuple[Callable[[], None], float]:
    """A function that runs the step on the next batch, and the seconds of its first two calls (compilation)."""
    precision, world = setting.precision, World(0, 1, device)
    config = LoaderConfig(
        BATCH,
        augmentation=AUGMENTATION,
        views=1 if setting.cached else None,
        channels_last=precision.channels_last,
        device=device,
    )
    dtype = None if precision.dtype == "float32" else DTYPES[precision.dtype]
    trained = [models.create(TEACHER, CLASSES) for _ in range(K)]
    live = LiveTeachers([models.freeze(t, dtype, precision.channels_last).to(device) for t in trained], CLASSES)
    teachers: Teachers = live
    if setting.cached:
        key = CacheKey.of(images, "train", config, "resident", live)
        loader = choose.loader(images, config, "resident")
        teachers = CachedTeachers(TeacherCache.build(folder, live, loader, key, Storage(), world=world), live.heads)
    elif precision.compiles_teachers(device.type):
        live.compile_for(BATCH)
    student = models.create(STUDENT, CLASSES)
    strategy = strategies.create("ca-mkd", teachers, feature_model(student).num_features)
    step = TrainStep(student, strategy, teachers, OptimConfig(epochs=1), precision, world, BATCH, seed=0)
    step.trainable.train()
    loader = choose.loader(images, replace(config, deferred=step.replays), "resident")
    batches = enumerate(with_following(endless(loader), step.looks_ahead))

    def run() -> None:
        number, (batch, following) = next(batches)
        step(batch, BATCH, 0.05, number, following)

    started = time.perf_counter()
    run()
    run()
    return run, time.perf_counter() - started


def loss_seconds(device: torch.device) -> float:
    """Median seconds of the fused loss and its gradient at the shape of this step."""
    student, *teachers = torch.randn(K + 1, BATCH, CLASSES, device=device).unbind()
    target = torch.randint(CLASSES, (BATCH,), device=device)
    call = {"loss": lambda: camkd_loss_and_grad(student, teachers, target)}
    return statistics.median(timer.interleaved(call, device, seconds=1, wall=True)["loss"])


def block(step: Callable[[], object], count: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(count):
            step()

    return run


def test_train_step(
    benchmark: Any, suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    device = suite.device
    settings = chosen_settings(device.type, request.config.option.shapes)
    images, steps = random_images(IMAGES[device.type]), BLOCK[device.type]
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)  # as the official code does
    official = OfficialStep(
        images,
        models.create(STUDENT, CLASSES).to(device),
        [models.create(TEACHER, CLASSES).to(device) for _ in range(K)],
        BATCH,
        workers=torch.get_num_threads(),
    )
    baseline = "official-style eager loop"
    contestants: dict[str, Callable[[], object]] = {baseline: official}
    first: dict[str, float] = {}
    for i, setting in enumerate(settings):
        contestants[setting.name], first[setting.name] = our_step(setting, images, tmp_path / str(i), device)
    watched = settings[-1].name
    blocks = {name: block(step, steps) for name, step in contestants.items()}
    times = timer.interleaved(
        blocks, device, seconds=suite.seconds(120.0), rounds=(5, 100), warm_up=1,
        benchmark=benchmark, watch=watched, wall=True,
    )  # fmt: skip
    loss = loss_seconds(device)
    suite.extra = {
        "setting": {"teachers": [TEACHER] * K, "student": STUDENT, "batch": BATCH, "classes": CLASSES, "block": steps},
        "loss_ms": 1e3 * loss,
    }
    for name, of_blocks in times.items():
        values = [seconds / steps for seconds in of_blocks]
        middle = statistics.median(values)
        row = {
            "name": name,
            **timer.percentiles(values),
            "images_per_second": BATCH / middle,
            "speed_up": timer.median_ratio(times[baseline], of_blocks),
            "loss_share": None if name == baseline else loss / middle,
            "first_two_steps_seconds": first.get(name),
            "rounds": len(values),
        }
        if device.type == "cuda":
            row |= on_the_device(contestants[name], device, middle)
        suite.record(benchmark if name == watched else None, row)


def on_the_device(step: Callable[[], object], device: torch.device, seconds: float) -> dict[str, float]:
    """Numbers of a step that takes so many seconds in a block."""
    singles = timer.interleaved({"step": step}, device, seconds=0.5, rounds=(9, 50), warm_up=1, wall=True)["step"]
    found = profiler.profiled(step, device, calls=5)  # of up to a thousand launches, which take the profiler long
    return {
        "latency_ms": 1e3 * statistics.median(singles),
        "launches": found.launches,
        "kernels": found.kernels,
        "gpu_busy": found.busy_us / (1e6 * seconds),
    }
