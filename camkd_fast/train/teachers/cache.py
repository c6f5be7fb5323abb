"""The teacher cache: outputs for every sample and view, computed once and replayed afterwards.

Logits are replayed bit for bit, independent of the batch. (A live teacher may round a sample differently in another
batch.) Feature maps are stored as their averages over height and width and replayed as (n, D_k, 1, 1) maps. The feature
loss then compares averages: the student's map is averaged before r_k, and heads that pool receive pooled features. This
differs from the live feature loss, but the cache is far smaller.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...models.protocol import Prediction
from ..distributed import ONE, World
from ..folder_lock import shared
from .cache_files import MANIFESTS, CacheError, CacheKey, Storage, manifests, shards
from .cache_writer import SHARD_BYTES, decode, write_missing
from .live import Head, Teachers

if TYPE_CHECKING:
    from ...data.batch import Batch, Loader

__all__ = ["CacheError", "CacheKey", "CachedTeachers", "Storage", "TeacherCache"]

CPU = torch.device("cpu")
CACHE_LOCK = ".cache.lock"  # not a run's lock: a run may keep its cache in its own folder
MEMORY_LIMIT = 4 << 30  # bytes up to which a cache is held in memory; a larger one is memory-mapped


class TeacherCache:
    """Stored outputs of K teachers; constructed by `open` or `build`.

    Attributes:
        key: everything that the outputs depend on.
        classes, channels: C, and D_k of each teacher (0 without features).
        errors: per writing rank, the loss error of truncation (`truncation.loss_error`); zeros without truncation.
        resident: True if the outputs are in device memory.
    """

    def __init__(self, folder: Path, key: CacheKey, storage: Storage, device: torch.device, memory_limit: int) -> None:
        found = manifests(folder, key, storage)
        if not found:
            raise CacheError(f"{folder} holds no teacher cache: there is no {MANIFESTS}")
        self.folder, self.key, self._device = folder, key, device
        self.classes, self.channels = found[0].classes, found[0].channels
        self.errors: list[dict[str, Any]] = [manifest.error for manifest in found]
        total = key.views * key.samples
        self._covered = torch.zeros(total, dtype=torch.bool)
        self._shard = torch.zeros(total, dtype=torch.int64)  # shard of each row, and position in the shard
        self._place = torch.zeros(total, dtype=torch.int64)
        self._shards: list[dict[str, Tensor]] = []
        for manifest in found:
            for shard in shards(folder, manifest):
                rows = shard.pop("rows")
                self._covered[rows] = True
                self._shard[rows], self._place[rows] = len(self._shards), torch.arange(len(rows))
                self._shards.append(shard)
        size = sum(tensor.nbytes for shard in self._shards for tensor in shard.values())
        self.resident = size <= memory_limit
        if self.resident:
            merged = self._gather(torch.arange(total))
            self._shards = [{name: tensor.to(device) for name, tensor in merged.items()}]

    @classmethod
    def open(
        cls,
        folder: Path,
        key: CacheKey,
        storage: Storage = Storage(),  # noqa: B008 - frozen
        *,
        unreadable: int = 0,
        device: torch.device = CPU,
        memory_limit: int = MEMORY_LIMIT,
    ) -> TeacherCache:
        """Open the complete cache in `folder`.

        Args:
            unreadable: samples per view that may be missing (files that the loader skips).
            device: of the replayed tensors.
            memory_limit: bytes up to which the outputs are held on the device; otherwise each batch is read from
                memory-mapped files.

        Raises:
            CacheError: the cache is missing, incomplete, damaged, or has another key or storage.
        """
        cache = cls(folder, key, storage, device, memory_limit)
        there, total = int(cache._covered.sum()), cache._covered.numel()
        if total - there > unreadable * key.views:
            raise CacheError(f"teacher cache {folder} holds {there} of {total} rows: writing it was not finished")
        return cache

    @classmethod
    def build(
        cls,
        folder: Path,
        teachers: Teachers,
        loader: Loader,
        key: CacheKey,
        storage: Storage = Storage(),  # noqa: B008 - frozen
        *,
        world: World = ONE,
        unreadable: int = 0,
        memory_limit: int = MEMORY_LIMIT,
        shard_bytes: int = SHARD_BYTES,
        progress: Callable[[int], None] = lambda samples: None,
        known_bad: Sequence[int] = (),
    ) -> TeacherCache:
        """Write the rows that `folder` lacks, then open it. No teacher runs if the cache is complete.

        Every rank calls this with its own loader and writes its own shards into the folder, which all ranks share.

        Args:
            loader: used only here, at the start of an epoch, with the settings of `key`; epoch v must be view v.
            progress: called with the number of samples of every batch.
            known_bad: samples that the loader leaves out, as their files are unreadable.

        Raises:
            CacheError: the cache in `folder` is damaged or has another key or storage.
            OSError: a shard cannot be written; earlier shards are kept, and another call continues from there.
        """
        with shared(folder, CACHE_LOCK, world=world, say=warnings.warn):  # the first of several jobs writes the cache
            write_missing(folder, teachers, loader, key, storage, world, shard_bytes, progress, known_bad)
        return cls.open(folder, key, storage, unreadable=unreadable, device=world.device, memory_limit=memory_limit)

    def outputs(self, view: int, index: Tensor) -> list[Prediction]:
        """Outputs of the teachers for samples of a view: `predictions` of `rows`."""
        return self.predictions(self.rows(view, index))

    def rows(self, view: int, index: Tensor) -> list[Tensor]:
        """The part of `outputs` that the host does: row numbers of a resident cache, otherwise the stored rows.

        Args:
            index: (n,) int64 on the CPU, positions in the data set.

        Raises:
            CacheError: the view or a sample is not in the cache.
        """
        views, N = self.key.views, self.key.samples
        if not 0 <= view < views:
            raise CacheError(f"teacher cache {self.folder} holds {views} views, but not view {view}")
        rows = view * N + index
        if not self._covered[rows].all():
            sample = int(index[~self._covered[rows]][0])
            raise CacheError(f"teacher cache {self.folder} has no outputs for sample {sample} in view {view}")
        return [rows] if self.resident else list(self._gather(rows).values())

    def predictions(self, rows: Sequence[Tensor]) -> list[Prediction]:
        """The part of `outputs` that the device does.

        Args:
            rows: from `rows`, on the host or the device.

        Returns:
            K predictions: features (n, D_k, 1, 1), logits (n, C), views of common tensors.
        """
        here = [tensor.to(self._device, non_blocking=True) for tensor in rows]
        names = list(self._shards[0])
        if self.resident:
            here = [self._shards[0][name].index_select(0, here[0]) for name in names]
        kept = dict(zip(names, here, strict=True))
        logits = decode(kept, self.classes).unbind(1)
        if 0 in self.channels:
            maps = [logits[0].new_empty((len(logits[0]), 0, 1, 1))] * len(logits)
        else:
            maps = [f[:, :, None, None] for f in torch.split(kept["features"], self.channels, 1)]
        return [Prediction(features, z) for features, z in zip(maps, logits, strict=True)]

    def _gather(self, rows: Tensor) -> dict[str, Tensor]:
        """Rows (n,) of every tensor, from their shards; rows that no shard holds are undefined."""
        shard, place = self._shard[rows], self._place[rows]
        out = {name: t.new_empty((len(rows), *t.shape[1:])) for name, t in self._shards[0].items()}
        for i in torch.unique(shard).tolist():
            here = (shard == i).nonzero().squeeze(1)
            for name, tensor in self._shards[i].items():
                out[name][here] = tensor[place[here]]
        return out


class CachedTeachers(Teachers):
    """`Teachers` that replay a cache.

    Args:
        heads: of the cached teachers, applied to a student's regressed maps.

    Raises:
        ValueError: the number of heads is not the number of cached teachers.
    """

    def __init__(self, cache: TeacherCache, heads: Sequence[Head]) -> None:
        K = len(cache.key.teachers)
        if len(heads) != K:
            raise ValueError(f"{len(heads)} heads were given, but the cache holds {K} teachers")
        self.cache, self._heads = cache, list(heads)

    @property
    def num_features(self) -> list[int]:
        return list(self.cache.channels)

    @property
    def heads(self) -> list[Head]:
        return self._heads

    @property
    def hashes(self) -> list[str]:
        return list(self.cache.key.teachers)

    @property
    def computes(self) -> bool:
        return False

    def inputs(self, batch: Batch) -> list[Tensor]:
        return self.cache.rows(batch.view, batch.index)

    def outputs(self, images: Tensor, inputs: Sequence[Tensor]) -> list[Prediction]:
        return self.cache.predictions(inputs)
