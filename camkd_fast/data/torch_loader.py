"""Loader on PyTorch's DataLoader, which runs on every machine."""

from __future__ import annotations

import gc
from collections.abc import Generator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .augment import records
from .batch import LoaderConfig
from .epoch_loader import EpochLoader
from .files import ImageFiles, ImageSet
from .images import LabelledImages
from .resident import array_crops

Levels = NDArray[np.uint8]
Key = tuple[int, Tensor]  # view, indices (n,) int64 of a batch
Prepared = tuple[Tensor, Tensor, dict[int, str]]  # levels (m, channels, H, W) uint8, their indices (m,), bad samples


class TorchLoader(EpochLoader):
    """Decodes files with Pillow, or crops arrays like `ResidentLoader`, in `workers` processes (0: in this one).

    The processes run until the loader is closed. Batches come in order, whichever worker prepares them.
    """

    def __init__(self, data: ImageSet, config: LoaderConfig) -> None:
        super().__init__(data, config)
        self._prepared: Dataset[Prepared]
        self._prepared = ArrayBatches(data, config) if isinstance(data, LabelledImages) else FileBatches(data, config)
        self._finish = self._normalised if config.deferred and not self._augments_levels else None
        self._plan: list[Key] = []  # the sampler of the DataLoader, replaced in place
        self._loader: DataLoader[Prepared] | None = DataLoader(
            self._prepared,
            sampler=self._plan,
            batch_size=None,
            num_workers=config.workers,
            persistent_workers=config.workers > 0,
            worker_init_fn=_keep_inherited,
            pin_memory=config.device.type == "cuda",
            generator=torch.Generator(),  # keeps the workers' seeds from being drawn from the global generator
        )

    def _images(self, batches: Sequence[Tensor], view: int) -> Generator[tuple[Tensor, Tensor], None, None]:
        if self._loader is None:
            raise RuntimeError("the loader is closed")
        self._plan[:] = [(view, self._readable(batch)) for batch in batches]
        for batch, (levels, index, problems) in zip(batches, self._loader, strict=True):
            self._reject_all(problems)
            while not len(index) and len(other := self._readable(batch)):  # all were damaged while they were decoded
                levels, index, problems = self._prepared[view, other]
                self._reject_all(problems)
            if self._finish is None:
                levels = self._augmented(levels.to(self.config.device, non_blocking=True), index, view)
            yield levels, index

    def _reject_all(self, problems: dict[int, str]) -> None:
        for sample, problem in problems.items():
            self._reject(sample, problem)

    def close(self) -> None:
        super().close()
        self._loader = None  # deleting its iterator ends the processes


def _keep_inherited(worker: int) -> None:
    """Keep inherited objects from collection: in a fork a DALI pipeline's destructor crashes without its threads."""
    gc.freeze()


class ArrayBatches(Dataset[Prepared]):
    """Augmented batches of images in memory."""

    def __init__(self, data: LabelledImages, config: LoaderConfig) -> None:
        self.seed = config.augmentation_seed
        self.crops = array_crops(data.pixels.cpu(), config.augmentation, config.channels_last)

    def __getitem__(self, key: Key) -> Prepared:
        view, index = key
        return self.crops(self.crops.records(self.seed, view, index)), index, {}


class FileBatches(Dataset[Prepared]):
    """Augmented batches of files. Files that cannot be decoded are reported instead of raised."""

    def __init__(self, data: ImageFiles, config: LoaderConfig) -> None:
        self.data, self.config = data, config
        self.format = torch.channels_last if config.channels_last else torch.contiguous_format

    def __getitem__(self, key: Key) -> Prepared:
        view, index = key
        read: dict[int, Levels] = {}
        problems: dict[int, str] = {}
        for sample in index.tolist():
            try:
                read[sample] = self._levels(sample, view)
            except ValueError as error:
                problems[sample] = str(error)
        levels = torch.zeros(len(read), *self.data.shape, dtype=torch.uint8).to(memory_format=self.format)
        for place, image in zip(levels, read.values(), strict=True):
            place.copy_(torch.from_numpy(image).permute(2, 0, 1))
        return levels, torch.tensor(list(read), dtype=torch.int64), problems

    def _levels(self, sample: int, view: int) -> Levels:
        """One augmented image (H, W, channels).

        Raises:
            ValueError: the file cannot be decoded.
        """
        from .decode import open_rgb, resized

        image = open_rgb(self.data.paths[sample])
        size = np.array([[image.height, image.width]])
        record = records(self.config.augmentation, self.config.augmentation_seed, view, np.array([sample]), size)
        levels = resized(image, record.windows[0], self.data.size)
        if record.shifts.any():
            reach = int(np.abs(record.shifts).max())
            top, left = (record.shifts[0] + reach).tolist()
            padded = np.pad(levels, ((reach, reach), (reach, reach), (0, 0)))
            levels = padded[top : top + self.data.size, left : left + self.data.size]
        return levels[:, ::-1].copy() if record.mirrored[0] else np.ascontiguousarray(levels)
