"""Teachers from run folders: loaded, checked against the student's images, frozen, live or cached."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ... import models
from ...data import choose
from ...data.batch import LoaderConfig
from ...data.files import ImageSet
from .. import strategies
from ..class_names import examples, renumbered
from ..config import DistillConfig
from ..distributed import World
from ..run_folder import load_model, model_metadata
from ..step import DTYPES
from .cache import CachedTeachers, CacheKey, Storage, TeacherCache
from .live import LiveTeachers, Teachers

log = logging.getLogger(__name__)


def load_teachers(config: DistillConfig, images: ImageSet, settings: LoaderConfig, world: World) -> Teachers | None:
    """The teachers of a run on `images`; None if its strategy needs none or the config has none.

    The logits of a teacher that knows the same classes in another order are mapped to the order of the images.

    Args:
        settings: of the training loader.

    Raises:
        ValueError: an unknown strategy, a teacher with other classes or another number of channels, or a stale cache.
        FileNotFoundError, CheckpointError: as `load_model`.
    """
    if not strategies.find(config.strategy).needs_teachers or not config.teachers:
        return None
    dtype = None if config.precision.dtype == "float32" else DTYPES[config.precision.dtype]
    frozen: list[nn.Module] = []
    for path in config.teachers:
        metadata = model_metadata(path)
        _check(path, metadata, images)
        model = models.freeze(load_model(path), dtype, config.precision.channels_last).to(world.device)
        frozen.append(renumbered(model, f"teacher {path}", metadata, images))
        if world.is_main and frozen[-1] is not model:
            log.warning("teacher %s has another order of the classes: its logits are mapped to the student's", path)
    _warn_unknown(config.teachers, images)
    live = LiveTeachers(frozen, images.num_classes)
    if config.precision.compiles_teachers(world.device.type):
        live.compile_for(settings.batch_size)
    if config.teacher_cache is None:
        return live
    return _cached(config, config.teacher_cache, live, images, settings, world)


def _check(path: Path, metadata: dict[str, Any], images: ImageSet) -> None:
    for name, mine in (("num_classes", images.num_classes), ("in_channels", images.channels)):
        if metadata[name] != mine:
            problem = f"teacher {path} has {name} {metadata[name]}, but the student's images have {mine}"
            theirs = metadata.get("class_names")
            if name == "num_classes" and theirs and images.class_names:
                problem += (
                    f": {examples(theirs, images.class_names)} there, {examples(images.class_names, theirs)} here"
                )
            raise ValueError(problem)
    seen, given = (metadata["mean"], metadata["std"]), (list(images.mean), list(images.std))
    if seen != given:
        warnings.warn(
            f"teacher {path} was trained on pixels of mean and deviation {seen}; the student's have {given}",
            stacklevel=2,
        )


def _warn_unknown(teachers: Sequence[Path], images: ImageSet) -> None:
    """Warn once if the classes of teachers and images can be compared only by number."""
    unknown = [str(path) for path in teachers if model_metadata(path).get("class_names") is None]
    if unknown or images.class_names is None:
        who = f"the model files of {', '.join(unknown)} have" if unknown else f"data set of {len(images)} images has"
        warnings.warn(
            f"{who} no class names: class 0 to {images.num_classes - 1} are taken to be the same for teachers and "
            "student",
            stacklevel=2,
        )


def _cached(
    config: DistillConfig, folder: Path, live: LiveTeachers, images: ImageSet, settings: LoaderConfig, world: World
) -> CachedTeachers:
    chosen: str = config.data.loader
    if chosen == "auto":
        chosen, _ = choose.pick(images, settings)
    key = CacheKey.of(images, "train", settings, chosen, live)
    features = strategies.find(config.strategy).needs_features
    storage = Storage(config.cache_dtype, config.cache_top_k, config.temperature, features)
    with closing(choose.loader(images, settings, chosen)) as loader:
        total = key.views * loader.num_samples if config.log.progress and world.is_main else None
        with _progress(total) as progress:
            cache = TeacherCache.build(
                folder, live, loader, key, storage, world=world, unreadable=config.data.skip_bad, progress=progress
            )
    return CachedTeachers(cache, live.heads)


@contextmanager
def _progress(total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar over `total` images, as a function that adds images; None: no bar."""
    if total is None:
        yield lambda images: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="img", desc="caching teachers", dynamic_ncols=True) as bar:

        def progress(images: int) -> None:
            bar.update(images)

        yield progress
