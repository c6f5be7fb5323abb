"""The images of a run: parts of the data set, what it trains on, augmentation, and settings of its loaders."""

from __future__ import annotations

from dataclasses import replace

from .. import system
from ..data import catalogue
from ..data.augment import Augmentation
from ..data.batch import LoaderConfig
from ..data.files import ImageSet
from ..data.images import corrupt_labels, stratified_parts, swap_labels
from ..data.splits import Splits
from ..data.unreadable import Unreadable, find_unreadable, read_all_headers
from ..torchrun import processes_here
from .config import DataConfig, JobConfig, TeachConfig
from .distributed import World, share_of_batch

EVALUATION_BATCH = 256  # images per process
LARGEST_CROPPED = 64  # side in pixels up to which "auto" augments by shifted crops, not by resized ones


def load_splits(config: DataConfig) -> Splits:
    """Training, validation and test part of the data set; errors as `catalogue.load`."""
    return catalogue.load(
        config.data, config.root, split_seed=config.split_seed, validation=config.validation, size=config.size
    )


def unreadable(parts: Splits, skip_bad: int, world: World) -> Unreadable:
    """The files that cannot be read, in every process; only rank 0 reads headers that no cache has.

    Raises:
        BadImageError: as `find_unreadable`.
    """
    world.on_main(lambda: read_all_headers(parts))
    return find_unreadable(parts, skip_bad, quiet=not world.is_main)


def training_set(config: JobConfig, train: ImageSet, world: World) -> tuple[ImageSet, LoaderConfig]:
    """Images and labels that a run trains on, and its loader settings."""
    images = _training_images(config, train)
    share = share_of_batch(config.optim.batch_size, world)
    return images, loader_config(config, world, share, training_augmentation(config.data, images))


def _training_images(config: JobConfig, train: ImageSet) -> ImageSet:
    """The configured number of images, stratified by class, with wrong or swapped labels if configured."""
    if config.data.images is not None:
        (kept,) = stratified_parts(train.labels, [config.data.images], config.data.split_seed)
        train = train.take(kept)
    if isinstance(config, TeachConfig) and config.wrong_labels:
        labels = corrupt_labels(train.labels, train.num_classes, config.wrong_labels, config.seed)
        train = replace(train, labels=labels)
    if isinstance(config, TeachConfig) and config.swapped:
        train = replace(train, labels=swap_labels(train.labels, train.num_classes, *config.swapped))
    return train


def training_augmentation(config: DataConfig, images: ImageSet) -> Augmentation:
    """The configured augmentation; "auto" depends on the image size."""
    side = max(images.shape[1:])
    kind = config.augmentation
    if kind == "auto":
        kind = "crop" if side <= LARGEST_CROPPED else "resized-crop"
    rand_augment = (config.rand_augment[0], config.rand_augment[1]) if config.rand_augment else None
    if kind == "none":
        return Augmentation(padding=0, flip=False, rand_augment=rand_augment, erasing=config.random_erasing)
    flip = config.data != "digits" if config.flip is None else config.flip
    padding = side // 8 if config.padding is None else config.padding
    if kind == "resized-crop":
        padding = 0
    return Augmentation(kind, padding, flip, rand_augment=rand_augment, erasing=config.random_erasing)


def loader_config(config: JobConfig, world: World, batch_size: int, augmentation: Augmentation | None) -> LoaderConfig:
    """Settings of a loader of this process; without augmentation for evaluation."""
    return LoaderConfig(
        batch_size=batch_size,
        seed=config.seed,
        augmentation=augmentation,
        view_seed=config.data.view_seed,
        views=config.data.views,
        rank=world.rank,
        world=world.size,
        workers=_workers() if config.data.workers is None else config.data.workers,
        device=world.device,
        channels_last=config.precision.channels_last,
        skip_bad=config.data.skip_bad,
    )


def _workers() -> int:
    """Threads or processes that decode for this process: its share of the machine's processors, 1 to 8."""
    return min(max(system.processors() // processes_here(), 1), 8)
