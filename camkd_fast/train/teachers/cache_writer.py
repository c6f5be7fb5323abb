"""Writing a teacher cache: one forward pass per sample and view."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...models.protocol import Prediction
from ..atomic import write_atomically
from ..config import DTYPES
from ..distributed import World
from .cache_files import CacheError, CacheKey, Manifest, Storage, manifests, shards
from .live import Teachers
from .truncation import Truncated, expand, loss_error, truncate

if TYPE_CHECKING:
    from ...data.batch import Loader

SHARD_BYTES = 64 << 20
MEASURED_ROWS = 256


def write_missing(
    folder: Path,
    teachers: Teachers,
    loader: Loader,
    key: CacheKey,
    storage: Storage,
    world: World,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int], None] = lambda samples: None,
    known_bad: Sequence[int] = (),
) -> None:
    """Write the rows that `folder` lacks; each rank writes the samples of its own loader.

    Args:
        loader: at the start of an epoch, with the settings of `key`; epoch v must deliver view v.
        progress: called with the number of samples of every batch.
        known_bad: samples that the loader leaves out, as their files are unreadable.

    Raises:
        CacheError: the cache in `folder` is damaged or does not match, or a batch has another view.
        OSError: a shard cannot be written; earlier shards are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    covered = torch.zeros(key.views * key.samples, dtype=torch.bool)
    by_view = covered.view(key.views, key.samples)
    by_view[:, list(known_bad)] = True
    for manifest in manifests(folder, key, storage):
        storage = manifest.storage  # may include features that this run does not need
        for shard in shards(folder, manifest):
            covered[shard["rows"]] = True
    world.wait()  # all ranks have read the manifests before the first one writes
    writer = _Writer(folder, key, storage, world.rank, shard_bytes)
    for view, done in enumerate(by_view.all(1).tolist()):
        if done:
            continue
        loader.set_epoch(view)
        for batch in loader:
            if batch.view != view:
                raise CacheError(f"the loader delivers view {batch.view} in epoch {view}, with views {key.views}")
            rows = view * key.samples + batch.index
            new = ~covered[rows]
            if new.any():
                writer.add(rows, teachers(batch), batch.target, new)
            progress(len(rows))
        writer.flush()
    world.wait()


class _Writer:
    """Collects outputs and writes them shard by shard."""

    def __init__(self, folder: Path, key: CacheKey, storage: Storage, rank: int, shard_bytes: int) -> None:
        self._folder, self._key, self._storage, self._rank = folder, key, storage, rank
        self._shard_bytes = shard_bytes
        self._path = folder / f"manifest.{rank:03d}.json"
        self._manifest = Manifest.read(self._path) if self._path.exists() else None
        self._pending: list[dict[str, Tensor]] = []
        self._bytes = 0

    def add(self, rows: Tensor, teacher_outputs: Sequence[Prediction], target: Tensor, new: Tensor) -> None:
        """Add the outputs for `rows` (n,) int64 where `new` (n,) bool is True."""
        logits = torch.stack([t.logits.cpu() for t in teacher_outputs], 1)
        kept = encode(logits, self._storage)
        if self._storage.features:
            features = torch.cat([_pooled(k, t.features) for k, t in enumerate(teacher_outputs)], 1)
            kept["features"] = features.to(DTYPES[self._storage.dtype])
        if self._manifest is None:
            C = logits.shape[2]
            channels = [t.features.shape[1] if self._storage.features else 0 for t in teacher_outputs]
            part = slice(0, MEASURED_ROWS)
            replayed = decode({name: tensor[part] for name, tensor in kept.items()}, C)
            error = loss_error(logits[part], replayed, target[part].cpu(), self._storage.temperature)
            self._manifest = Manifest(self._key, self._storage, C, channels, {"rows": len(replayed), **error})
        shard = {"rows": rows, **kept}
        self._pending.append({name: tensor[new] for name, tensor in shard.items()})
        self._bytes += sum(tensor.nbytes for tensor in self._pending[-1].values())
        if self._bytes >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write all pending rows as a shard, then list it in the manifest."""
        from safetensors.torch import save

        if not self._pending or self._manifest is None:
            return
        shard = {name: torch.cat([part[name] for part in self._pending]) for name in self._pending[0]}
        data = save(shard)
        path = self._folder / f"{self._rank:03d}-{len(self._manifest.shards):05d}.safetensors"
        try:
            write_atomically(path, data)
            entry = {"file": path.name, "rows": len(shard["rows"]), "sha256": hashlib.sha256(data).hexdigest()}
            self._manifest.shards.append(entry)
            self._manifest.write(self._path)
        except OSError as error:
            message = f"cannot write {path}: {error.strerror}; the shards before it are kept"
            raise OSError(error.errno, message) from error
        self._pending, self._bytes = [], 0


def encode(logits: Tensor, storage: Storage) -> dict[str, Tensor]:
    """Convert logits (n, K, C) to the tensors of a shard."""
    dtype = DTYPES[storage.dtype]
    if storage.top_k is None:
        return {"logits": logits.to(dtype)}
    return truncate(logits, storage.top_k, storage.temperature, dtype)._asdict()


def decode(shard: dict[str, Tensor], num_classes: int) -> Tensor:
    """Logits (n, K, C) of a shard in their stored dtype; float32 if truncated."""
    if "logits" in shard:
        return shard["logits"]
    return expand(Truncated(shard["ids"], shard["values"], shard["tail"]), num_classes)


def _pooled(k: int, features: Tensor) -> Tensor:
    """Average a feature map (n, D, H, W) to (n, D) float32 on the CPU."""
    if features.dim() != 4:
        raise CacheError(f"the feature map of teacher {k} has shape {tuple(features.shape)}, not (n, D, H, W)")
    return features.float().mean((2, 3)).cpu()
