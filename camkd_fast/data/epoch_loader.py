"""Base class of the loaders: order, position, labels, normalisation and unreadable files."""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from .batch import CPU, BadImageError, Batch, LoaderConfig
from .erasing import boxes, erase
from .files import ImageFiles, ImageSet
from .images import channel_factors, normalised
from .order import epoch_batches, rank_sizes
from .rand_augment import draws, rand_augment

log = logging.getLogger(__name__)
WAY_OUT = "replace the file or raise skip_bad, and resume"


class EpochLoader(ABC):
    """Implements `Loader` except for `_images`, which maps indices to images."""

    def __init__(self, data: ImageSet, config: LoaderConfig) -> None:
        self.data, self.config = data, config
        self._shuffle = config.augmentation is not None
        self._sizes = rank_sizes(len(data), config.batch_size, config.world, config.rank, self._shuffle)
        self.num_samples = sum(self._sizes)
        self._labels = data.labels.to(CPU if config.deferred else config.device)
        self._epoch = self._position = 0
        self._bad = set(config.known_bad)  # samples whose file cannot be read
        self._running: Generator[Batch, None, None] | None = None
        self._finish: Callable[[Tensor], Tensor] | None = None  # see `Batch`
        mean, factor = channel_factors(data.mean, data.std, config.device)
        if config.channels_last:
            # Rows of W * C values: a last dimension of C = 3 is too short for vector instructions.
            mean, factor = (v.view(-1).repeat(data.shape[2]) for v in (mean, factor))
        self._mean, self._factor = mean, factor

    @abstractmethod
    def _images(self, batches: Sequence[Tensor], view: int) -> Generator[tuple[Tensor, Tensor], None, None]:
        """For each batch of indices (n,), yield normalised images (m, channels, H, W) and the m readable indices.

        m is 0 if all files of an evaluation batch are unreadable.
        The generator may be closed early. The next call does not depend on it.
        """

    def __len__(self) -> int:
        return len(self._sizes)

    def set_epoch(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._stop()
            self._epoch, self._position = epoch, 0

    def __iter__(self) -> Iterator[Batch]:
        self._stop()
        self._running = self._run()
        return self._running

    def _run(self) -> Generator[Batch, None, None]:
        c = self.config
        view = c.view(self._epoch)
        batches = epoch_batches(len(self.data), c.batch_size, c.world, c.rank, c.seed, self._epoch, self._shuffle)
        batches = batches[self._position :]
        images = self._images(batches, view)
        try:
            for (pixels, index), planned, labels in zip(images, batches, self._labels_of(batches), strict=True):
                self._position += 1  # before the yield: a state saved while the batch is in use continues after it
                if not torch.equal(index, planned):  # without the unreadable files
                    (labels,) = self._labels_of([index])
                if len(index):
                    yield Batch(pixels, labels, index, view, self._finish)
        finally:
            images.close()
        self._position = 0

    def _labels_of(self, batches: Sequence[Tensor]) -> Sequence[Tensor]:
        """Labels for batches of indices, by one copy and one launch if they are on the device."""
        if not batches:
            return []
        index = torch.cat(list(batches)).to(self._labels.device, non_blocking=True)
        return torch.split(self._labels[index], [len(batch) for batch in batches])

    def _stop(self) -> None:
        """Close an iteration that ended early."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def close(self) -> None:
        self._stop()

    def _normalised(self, levels: Tensor) -> Tensor:
        """Normalise uint8 levels (n, channels, H, W), given in the configured memory format, to float32."""
        if not self.config.channels_last:
            return normalised(levels, self._mean, self._factor)
        rows = levels.permute(0, 2, 3, 1).flatten(2)
        n, C, H, W = levels.shape
        return normalised(rows, self._mean, self._factor).view(n, H, W, C).permute(0, 3, 1, 2)

    @property
    def _augments_levels(self) -> bool:
        """Whether `_augmented` does more than to normalise; this depends on samples, so `Batch.finish` cannot do it."""
        a = self.config.augmentation
        return a is not None and a.of_levels

    def _augmented(self, levels: Tensor, index: Tensor, view: int) -> Tensor:
        """Normalised images of the samples `index` (n,): uint8 levels after RandAugment, and erased boxes."""
        a, seed = self.config.augmentation, self.config.augmentation_seed
        if a is not None and a.rand_augment is not None and len(index):
            rounds, magnitude = a.rand_augment
            levels = rand_augment(levels, draws(rounds, seed, view, index.numpy()), magnitude)
        images = self._normalised(levels)
        if a is not None and a.erasing:
            _, H, W = self.data.shape
            erased = torch.from_numpy(boxes(a.erasing, seed, view, index.numpy(), H, W))
            erase(images, erased.to(images.device, non_blocking=True))
        return images

    def _readable(self, index: Tensor) -> Tensor:
        """`index` without the samples found unreadable so far.

        If none is left, the result is empty in evaluation, and another sample in training, which has a fixed number of
        steps in every epoch and process.

        Raises:
            BadImageError: no sample of the set is left.
        """
        if not self._bad or not len(index):
            return index
        kept = [i for i in index.tolist() if i not in self._bad]
        if not kept:
            N = len(self.data)
            others = ((int(index[0]) + step) % N for step in range(1, N))
            other = next((sample for sample in others if sample not in self._bad), None)
            if other is None:
                first = self._path(int(index[0]))
                raise BadImageError(f"no image of a batch of {len(index)} can be read, the first is {first}")
            kept = [other] * self._shuffle
        return torch.tensor(kept, dtype=torch.int64)

    def _reject(self, sample: int, reason: str) -> None:
        """Skip a sample from now on.

        Raises:
            BadImageError: `skip_bad` other samples are skipped already. The message names the file.
        """
        if sample in self._bad:
            return
        problem = f"{self._path(sample)} cannot be read as an image: {reason}"
        allowed = self.config.skip_bad
        if len(self._bad) >= allowed:
            raise BadImageError(f"{problem} (at most skip_bad={allowed} such files are skipped): {WAY_OUT}")
        self._bad.add(sample)
        log.warning("skipped: %s (%d of skip_bad=%d)", problem, len(self._bad), allowed)

    def _path(self, sample: int) -> str:
        return str(self.data.paths[sample]) if isinstance(self.data, ImageFiles) else f"image {sample}"

    def _settings(self) -> dict[str, Any]:
        """Settings that must match for a position to mean the same samples and pixels."""
        c = self.config
        labels = self.data.labels.cpu().contiguous().numpy()
        return {
            "samples": len(self.data),
            "labels": hashlib.sha256(labels.data).hexdigest()[:16],
            "seed": c.seed,
            "augmentation seed": c.augmentation_seed,
            "global batch": c.batch_size * c.world,
            "augmentation": str(c.augmentation),
            "views": c.views,
        }

    def state_dict(self, unused: int = 0) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "batch": self._position - unused,
            "batches": len(self),
            "bad": sorted(self._bad),
            "classes": None if self.data.class_names is None else list(self.data.class_names),
            "settings": self._settings(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        saved = state["settings"]
        for name, value in self._settings().items():
            # A state of an earlier version lacks the settings that were added since.
            if saved.get(name, value) != value:
                raise ValueError(f"the saved position has {name} {saved[name]!r}, this loader has {value!r}")
        there, here = state.get("classes"), self.data.class_names
        if there is not None and here is not None and there != list(here):
            old, new = next(pair for pair in zip_longest(there, here) if pair[0] != pair[1])
            raise ValueError(f"the saved position has a class {old!r} where this loader has {new!r}")
        done, planned = state["batch"], state["batches"]
        if done < planned and done >= len(self) and self._shuffle:
            # A short last step may be separate on few ranks and merged on many (see `order.step_sizes`).
            raise ValueError(f"the saved position is before batch {done} of {planned}, this loader has {len(self)}")
        self._stop()
        self._epoch, self._bad = state["epoch"], {*state["bad"], *self.config.known_bad}
        self._position = len(self) if done == planned else min(done, len(self))
