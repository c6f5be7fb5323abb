"""Small parts for the tests of the training loop."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camkd_fast.data import LabelledImages
from camkd_fast.data.augment import Augmentation
from camkd_fast.data.batch import Batch, LoaderConfig
from camkd_fast.data.resident import ResidentLoader
from camkd_fast.train import strategies
from camkd_fast.train.checkpoint import Checkpoints
from camkd_fast.train.config import LogConfig, OptimConfig, PrecisionConfig
from camkd_fast.train.distributed import World
from camkd_fast.train.step import TrainStep
from camkd_fast.train.step_graph import Recorder
from camkd_fast.train.teachers.live import LiveTeachers
from camkd_fast.train.trainer import Trainer

CLASSES, CHANNELS, SIDE = 10, 3, 8
ONE = World(0, 1, torch.device("cpu"))
EAGER = PrecisionConfig(compile="off")
OPTIM = OptimConfig(epochs=3, batch_size=32)


class SmallNet(nn.Module):
    """Two convolutions and a classifier, whose initial parameters depend only on `seed`."""

    def __init__(self, width: int = 8, batch_norm: bool = False, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        self.num_features, self.num_classes = width, CLASSES
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv1 = nn.Conv2d(CHANNELS, width, 3, padding=1)
            self.conv2 = nn.Conv2d(width, width, 3, padding=1, stride=2)
            self.fc = nn.Linear(width, CLASSES)
        self.norm = nn.BatchNorm2d(width) if batch_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward_features(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv2(F.relu(self.conv1(x)))))

    def forward_head(self, features: Tensor) -> Tensor:
        return self.fc(self.dropout(features.mean((2, 3))))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def images(count: int, seed: int = 0) -> LabelledImages:
    """Noisy images (count, CHANNELS, SIDE, SIDE) of a pattern per class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    patterns = torch.rand(CLASSES, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(99))
    noise = torch.rand(count, CHANNELS, SIDE, SIDE, generator=generator)
    pixels = ((patterns[labels] + noise) * 127).to(torch.uint8)
    return LabelledImages(pixels, labels, CLASSES, (127.0,) * CHANNELS, (50.0,) * CHANNELS)


def batch(count: int = 32, seed: int = 0) -> Batch:
    data = images(count, seed)
    return Batch(data.normalise(data.pixels), data.labels, torch.arange(count), 0)


def loader(data: LabelledImages, batch_size: int, world: World = ONE, train: bool = True) -> ResidentLoader:
    """Loader of this rank's part of steps of `batch_size` images over all ranks."""
    augmentation = Augmentation(padding=1) if train else None
    config = LoaderConfig(batch_size // world.size, augmentation=augmentation, rank=world.rank, world=world.size)
    return ResidentLoader(data, config)


def teachers(count: int = 2) -> LiveTeachers:
    return LiveTeachers([SmallNet(6 + k, seed=10 + k) for k in range(count)], CLASSES)


def train_step(
    strategy: str = "ca-mkd",
    student: nn.Module | None = None,
    precision: PrecisionConfig = EAGER,
    world: World = ONE,
    full_batch: int = 32,
    seed: int = 0,
    recorder: Recorder | None = None,
) -> TrainStep:
    """A step for a small student, seeded throughout."""
    student = SmallNet() if student is None else student
    frozen = None if strategy == "ce" else teachers()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = strategies.create(strategy, frozen, student.num_features)
    return TrainStep(student, parts, frozen, OPTIM, precision, world, full_batch, seed, recorder)


def trainer(
    out: Path,
    step: TrainStep | None = None,
    count: int = 150,
    optim: OptimConfig = OPTIM,
    log: LogConfig | None = None,
    world: World = ONE,
) -> Trainer:
    """`step` over `count` images."""
    return Trainer(
        train_step(world=world) if step is None else step,
        loader(images(count), optim.batch_size, world),
        loader(images(70, seed=5), 32, world, train=False),
        count,
        optim,
        0.02,
        log or LogConfig(),
        Checkpoints(out / "checkpoints"),
        {"model": "small"},
        world,
    )


def parameters(step: TrainStep) -> Tensor:
    """Everything that the step trains, flat."""
    return torch.cat([p.detach().flatten() for p in step.trainable.parameters()])


def gradients(module: nn.Module) -> Tensor:
    """Of all parameters that have one, as one vector."""
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def relative(one: Tensor, two: Tensor) -> float:
    """Relative error in norm."""
    return float((one - two).detach().norm() / two.detach().norm())
