"""Files of a teacher cache: shards of outputs, and one manifest per writing rank with their hashes.

    manifest.000.json       `CacheKey`, `Storage` and the list of rank 0's shards
    000-00000.safetensors   "rows" (R,) int64 = view * samples + position in the data set, and for each row
                            "logits" (R, K, C), or "ids", "values" (R, K, k) and "tail" (R, K), see `truncation`
                            "features" (R, D_1 + ... + D_K), feature maps averaged over height and width

Every file is written under a temporary name and renamed. A shard is valid once its manifest lists it, so a killed
writer loses only unlisted shards. Writers never share a file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..atomic import write_atomically
from .live import LiveTeachers
from .teacher_hash import difference, same_teacher

if TYPE_CHECKING:
    from ...data.batch import LoaderConfig
    from ...data.files import ImageFiles
    from ...data.images import LabelledImages

FORMAT = 1
MANIFESTS = "manifest.*.json"


class CacheError(ValueError):
    """A teacher cache does not match, is incomplete or is damaged."""


@dataclass(frozen=True)
class CacheKey:
    """Everything that the teachers' outputs depend on."""

    data: str  # fingerprint of the images
    split: str
    samples: int
    shape: tuple[int, ...]  # channels, height, width that the loader delivers
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: str
    seed: int  # of the augmentation
    views: int
    loader: str  # kind; two kinds may decode or resize a file with a difference of one level
    teachers: tuple[str, ...]  # hashes, see `teacher_hash`
    autocast: str  # dtype of the teachers' autocast, or "None"

    @classmethod
    def of(
        cls,
        data: LabelledImages | ImageFiles,
        split: str,
        config: LoaderConfig,
        loader: str,
        teachers: LiveTeachers,
    ) -> CacheKey:
        """Key of the outputs of `teachers` for `data`, loaded with `config`.

        Args:
            split: "train", for instance.
            loader: the kind that was chosen, "resident", "dali" or "torch".

        Raises:
            ValueError: the config has no fixed number of views.
        """
        if config.views is None and config.augmentation is not None:
            raise ValueError("a teacher cache needs a fixed number of views, got views None")
        return cls(
            data=data.fingerprint(),
            split=split,
            samples=len(data),
            shape=tuple(data.shape),
            mean=tuple(data.mean),
            std=tuple(data.std),
            augmentation=str(config.augmentation),
            seed=config.augmentation_seed,
            views=config.views or 1,
            loader=loader,
            teachers=tuple(teachers.hashes),
            autocast=str(teachers.autocast),
        )


@dataclass(frozen=True)
class Storage:
    """Storage format of outputs.

    Raises:
        ValueError: another dtype, a `top_k` below 1 or a temperature that is not positive.
    """

    dtype: str = "float32"  # of logits and features; "float32" is exact for float32 teachers
    top_k: int | None = None  # logits kept per row, besides a bucket for the rest; None: all
    temperature: float = 4.0  # of the distillation; at this temperature the bucket's mass is exact
    features: bool = True  # store pooled feature maps too

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, got {self.dtype!r}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")


SHARD = ("file", "rows", "sha256")


@dataclass
class Manifest:
    """Everything that one rank wrote."""

    key: CacheKey
    storage: Storage
    classes: int
    channels: list[int]  # D_k; 0 if feature maps are not stored
    error: dict[str, Any]  # number of rows first written, and `truncation.loss_error` on them
    shards: list[dict[str, Any]] = field(default_factory=list)  # with the fields SHARD

    def write(self, path: Path) -> None:
        write_atomically(path, json.dumps({"format": FORMAT, **asdict(self)}, indent=1).encode())

    @classmethod
    def read(cls, path: Path) -> Manifest:
        try:
            content = json.loads(path.read_bytes())
            found = content.pop("format")
            key: dict[str, Any] = content.pop("key") if found == FORMAT else {}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CacheError(f"{path} is damaged: {error!r}") from error
        if found != FORMAT:
            raise CacheError(f"{path} has format {found}, but this version reads format {FORMAT}")
        try:
            key.update({name: tuple(value) for name, value in key.items() if isinstance(value, list)})
            manifest = cls(CacheKey(**key), Storage(**content.pop("storage")), **content)
            manifest.channels = [int(channels) for channels in manifest.channels]
            manifest.shards = [{name: shard[name] for name in SHARD} for shard in manifest.shards]
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise CacheError(f"{path} is damaged: {error!r}") from error
        return manifest


def manifests(folder: Path, key: CacheKey, storage: Storage) -> list[Manifest]:
    """Manifests of all ranks that wrote into `folder`, checked against `key` and `storage`.

    Caches of earlier versions are checked as `teacher_hash` says.

    Raises:
        CacheError: a manifest is damaged or does not match; the message has every difference with both values, and what
            to do.
    """
    found = []
    for path in sorted(folder.glob(MANIFESTS)):
        manifest = Manifest.read(path)
        there, here = _settings(manifest.key, manifest.storage), _settings(key, storage)
        if manifest.storage.features and not storage.features:
            here["features"] = True  # stored features may go unused
        names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
        faults = [f"{name} is {there.get(name)} there, {here.get(name)} here" for name in names]
        faults += _other_images(manifest.key, key) + _other_teachers(manifest.key, key)
        if faults:
            fits = f"--view-seed {manifest.key.seed} takes these views, or " * (names == ["seed"] and len(faults) == 1)
            raise CacheError(
                f"teacher cache {folder} does not fit: {'; '.join(faults)}: {fits}choose another folder, or remove "
                "this one, which is then written again"
            )
        found.append(manifest)
    return found


def _settings(key: CacheKey, storage: Storage) -> dict[str, Any]:
    """Key and storage as one mapping, without hashes."""
    settings = {**asdict(key), **asdict(storage)}
    del settings["teachers"], settings["data"]
    if storage.top_k is None:
        del settings["temperature"]
    return settings


def _other_images(there: CacheKey, here: CacheKey) -> list[str]:
    if there.data == here.data:
        return []
    return [f"its images (files, labels or their order) have the hash {there.data[:12]}, those here {here.data[:12]}"]


def _other_teachers(there: CacheKey, here: CacheKey) -> list[str]:
    return [
        f"teacher {k} {difference(old, new)} (hash {_short(old)} there, {_short(new)} here)"
        for k, (old, new) in enumerate(zip_longest(there.teachers, here.teachers))
        if old is None or new is None or not same_teacher(old, new)
    ]


def _short(digest: str | None) -> str:
    """The first digits of both parts of a teacher's hash."""
    return "none" if digest is None else ".".join(part[:12] for part in digest.split("."))


def shards(folder: Path, manifest: Manifest) -> Iterator[dict[str, Tensor]]:
    """The memory-mapped tensors of each shard, after a check of its hash.

    Raises:
        CacheError: a shard is missing, truncated or changed.
    """
    from safetensors.torch import load_file

    for shard in manifest.shards:
        path = folder / shard["file"]
        try:
            digest = _sha256(path)
        except OSError as error:
            raise CacheError(f"shard {path} cannot be read: {error.strerror}") from error
        if digest != shard["sha256"]:
            size = path.stat().st_size
            raise CacheError(f"shard {path} is damaged: its {size} bytes have sha256 {digest}, not {shard['sha256']}")
        yield load_file(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
