"""Small parts for the tests of the training loop: a model without batch norm, a loader without augmentation."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camkd_fast.train import strategies
from camkd_fast.train.checkpoint import Checkpoints
from camkd_fast.train.config import LogConfig, OptimConfig, PrecisionConfig
from camkd_fast.train.distributed import World, share_of_batch
from camkd_fast.train.step import TrainStep
from camkd_fast.train.teachers import LiveTeachers
from camkd_fast.train.trainer import Trainer

CLASSES, CHANNELS, SIDE = 10, 3, 8
ONE = World(0, 1, torch.device("cpu"))


class SmallNet(nn.Module):
    """Two convolutions and a classifier; dropout, where asked for, draws from torch's generator."""

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


def images(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random images (count, CHANNELS, SIDE, SIDE) and labels that a model can learn from them."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    pattern = torch.randn(CLASSES, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(99))
    return torch.randn(count, CHANNELS, SIDE, SIDE, generator=generator) + pattern[labels], labels


class PlainLoader:
    """The loader contract over tensors: exact shards, an order that depends on seed and epoch alone, a position."""

    def __init__(
        self, data: tuple[Tensor, Tensor], global_batch: int, seed: int = 0, shuffle: bool = True, world: World = ONE
    ) -> None:
        self.pixels, self.labels = data
        self.seed, self.shuffle, self.world = seed, shuffle, world
        self.bounds = list(range(0, len(self.labels), global_batch))
        self.bounds.append(len(self.labels))
        self.epoch = self.batch = 0
        self.seen: list[Tensor] = []  # indices of each batch that was given out

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def set_epoch(self, epoch: int) -> None:
        self.epoch, self.batch = epoch, 0

    def __iter__(self) -> Iterator[Any]:
        order = torch.arange(len(self.labels))
        if self.shuffle:
            order = torch.randperm(
                len(self.labels), generator=torch.Generator().manual_seed(1000 * self.seed + self.epoch)
            )
        while self.batch < len(self):
            start, end = self.bounds[self.batch : self.batch + 2]
            index = torch.tensor_split(order[start:end], self.world.size)[self.world.rank]
            self.batch += 1
            self.seen.append(index)
            yield SimpleNamespace(images=self.pixels[index], target=self.labels[index], index=index, view=self.epoch)
        self.batch = 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.batch = state["epoch"], state["batch"]


def teachers(count: int = 2) -> LiveTeachers:
    return LiveTeachers([SmallNet(6 + k, seed=10 + k) for k in range(count)], CLASSES)


def train_step(
    strategy: str = "ca-mkd",
    student: nn.Module | None = None,
    optim: OptimConfig | None = None,
    precision: PrecisionConfig | None = None,
    world: World = ONE,
    full_batch: int = 64,
    seed: int = 0,
) -> TrainStep:
    """A step for a small student, seeded throughout."""
    student = SmallNet() if student is None else student
    taught = None if strategy == "ce" else teachers()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = strategies.create(strategy, taught, student.num_features)
    precision = PrecisionConfig(compile="off") if precision is None else precision
    return TrainStep(student, parts, taught, optim or OptimConfig(), precision, world, full_batch, seed)


def trainer(
    step: TrainStep,
    out: Any,
    count: int = 150,
    optim: OptimConfig | None = None,
    log: LogConfig | None = None,
    world: World = ONE,
) -> Trainer:
    """`step` over `count` images."""
    optim = optim or OptimConfig(epochs=2, batch_size=32)
    share_of_batch(optim.batch_size, world)
    return Trainer(
        step,
        PlainLoader(images(count), optim.batch_size, world=world),
        PlainLoader(images(70, seed=5), 32, shuffle=False, world=world),
        count,
        optim,
        0.05,
        log or LogConfig(),
        Checkpoints(out / "checkpoints"),
        {"model": "small"},
        world,
    )
