"""Teachers, a loader and a key for the tests of the teacher cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from camkd_fast.data.batch import Batch
from camkd_fast.models.protocol import Prediction
from camkd_fast.train.teachers.cache import CacheKey, Storage, TeacherCache
from camkd_fast.train.teachers.live import LiveTeachers

N, VIEWS, CLASSES = 50, 2, 5


class Tiny(nn.Module):
    """A 1x1 convolution, global average pooling, a linear layer, with sums in an order independent of the batch size.

    (torch's own convolutions and matrix products may round a sample differently in another batch.)
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.num_features, self.num_classes = channels, CLASSES
        self.mix = nn.Parameter(torch.randn(channels, 3))
        self.fc = nn.Parameter(torch.randn(CLASSES, channels))

    def forward_features(self, x: Tensor) -> Tensor:
        return (x.unsqueeze(1) * self.mix[:, :, None, None]).sum(2).relu()

    def forward_head(self, features: Tensor) -> Tensor:
        return (features.mean((2, 3)).unsqueeze(1) * self.fc).sum(2)


class CountedTeachers(LiveTeachers):
    """Counts the samples that it computes, and can fail after a given number."""

    asked = 0
    dies_after = 10**9

    def __call__(self, batch: Batch) -> list[Prediction]:
        self.asked += len(batch.index)
        if self.asked > self.dies_after:
            raise KeyboardInterrupt
        return super().__call__(batch)


class FakeLoader:
    """Images that are a function of view and position; a new order in every epoch; every `world`-th sample."""

    def __init__(self, rank: int = 0, world: int = 1, batch_size: int = 8, views: int = VIEWS, bad: int = -1) -> None:
        self.rank, self.world, self.batch_size, self.views, self.bad = rank, world, batch_size, views, bad
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        order = torch.randperm(N, generator=torch.Generator().manual_seed(self.epoch))
        order = order[order != self.bad][self.rank :: self.world]
        for index in order.split(self.batch_size):
            yield batch_of(index, self.epoch % self.views)


def batch_of(index: Tensor, view: int) -> Batch:
    images = [torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(1000 * view + i)) for i in index.tolist()]
    return Batch(torch.stack(images), index % CLASSES, index, view)


def make_teachers(seed: int = 0) -> CountedTeachers:
    torch.manual_seed(seed)
    return CountedTeachers([Tiny(3), Tiny(4), Tiny(6)], CLASSES)


def make_key(teachers: LiveTeachers, **changes: object) -> CacheKey:
    key = CacheKey(
        data="d" * 64,
        split="train",
        samples=N,
        shape=(3, 4, 4),
        mean=(0.0,),
        std=(1.0,),
        augmentation="Augmentation(kind='crop')",
        seed=0,
        views=VIEWS,
        loader="resident",
        teachers=tuple(teachers.hashes),
        autocast="None",
    )
    return replace(key, **changes)


def build(folder: Path, teachers: CountedTeachers, storage: Storage = Storage(), **keywords: object) -> TeacherCache:  # noqa: B008
    loader = keywords.pop("loader", None) or FakeLoader()
    return TeacherCache.build(folder, teachers, loader, make_key(teachers), storage, **keywords)
