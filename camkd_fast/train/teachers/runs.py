"""The teachers of a run: loaded from their sources, fitted to the student's images, frozen, live or cached."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from ... import models
from ...data import choose
from ...data.batch import LoaderConfig
from ...data.files import ImageSet
from ...models import sources
from ...models.protocol import Source
from ...models.split import LogitsOnly
from .. import strategies
from ..class_map import ClassMap
from ..config import DTYPES, DistillConfig
from ..distributed import World
from ..source_strings import SourceString
from .cache import CachedTeachers, CacheKey, Storage, TeacherCache
from .fitted import Fitted, fitted
from .live import LiveTeachers, Teachers

log = logging.getLogger(__name__)


def load_teachers(config: DistillConfig, images: ImageSet, settings: LoaderConfig, world: World) -> Teachers | None:
    """The teachers of a run on `images`; None if its strategy needs none or the config has none.

    Each gets the images as it expects them, and gives the logits of their classes in their order.

    Args:
        settings: of the training loader.

    Raises:
        ValueError: an unknown strategy; a source that cannot be loaded, as in `sources.load`; a teacher that cannot
            take the images, has other classes, or lacks the feature map that the strategy needs; or a stale cache.
        FileNotFoundError, CheckpointError: as `sources.load`.
    """
    strategy = strategies.find(config.strategy)
    if not strategy.needs_teachers or not config.teachers:
        return None
    dtype = None if config.precision.dtype == "float32" else DTYPES[config.precision.dtype]
    class_map = None if config.class_map is None else ClassMap.read(config.class_map, config.teachers)
    found: dict[SourceString, tuple[Source, Fitted]] = {}
    for name in config.teachers:
        source = load_source(name, strategy)
        model = models.freeze(source.model, dtype, config.precision.channels_last).to(world.device)
        found[name] = source, fitted(name, model, source, images, class_map)
    if world.is_main:
        _report(found, images)
    live = LiveTeachers([found[name][1].model for name in config.teachers], images.num_classes)
    if config.precision.compiles_teachers(world.device.type):
        live.compile_for(settings.batch_size)
    if config.teacher_cache is None:
        return live
    return _cached(config, config.teacher_cache, live, images, settings, world)


def load_source(name: SourceString, strategy: type[strategies.Strategy]) -> Source:
    """A teacher as it was trained.

    Raises:
        ValueError: it lacks the feature map that the strategy needs; or as `sources.load`.
        OSError, CheckpointError: as `sources.load`.
    """
    source = sources.load(name)
    if isinstance(source.model, LogitsOnly):
        strategies.refuse_logits_only(f"teacher {name}", source.model.reason, strategy)
    return source


def _report(found: Mapping[SourceString, tuple[Source, Fitted]], images: ImageSet) -> None:
    """Say what was done about teachers that differ from the images, and what could not be compared."""
    for name, (_, teacher) in found.items():
        if teacher.classes > images.num_classes:
            log.warning(
                "teacher %s has %d classes: the logits of the student's %d are taken",
                *(name, teacher.classes, images.num_classes),
            )
        elif teacher.reordered:
            log.warning("teacher %s has another order of the classes: its logits are mapped to the student's", name)
    if unknown := [name for name, (source, _) in found.items() if source.mean is None]:
        log.warning(
            "no mean and std are known of %s: images are normalised as the student's, or say ?mean=...&std=...",
            ", ".join(unknown),
        )
    if unnamed := [name for name, (_, teacher) in found.items() if not teacher.compared]:
        of = "the student's images" if images.class_names is None else ", ".join(unnamed)
        warnings.warn(
            f"no class names are known of {of}: class 0 to {images.num_classes - 1} are taken to be the same for "
            "teachers and student",
            stacklevel=3,
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
                folder,
                live,
                loader,
                key,
                storage,
                world=world,
                unreadable=config.data.skip_bad,
                known_bad=settings.known_bad,
                progress=progress,
            )
    if world.is_main:
        _report_rounding(cache)
    return CachedTeachers(cache, live.heads)


def _report_rounding(cache: TeacherCache) -> None:
    """Say what a cache that does not keep all of the logits costs."""
    students = [error[name] for error in cache.errors for name in ("untrained", "half way")]
    loss, gradient = (max(student[f"{what} max"] for student in students) for what in ("loss", "gradient"))
    if loss > 0:
        rows = sum(error["rows"] for error in cache.errors)
        log.warning(
            "the cached logits change CA-MKD's loss by up to %.2g %% and its gradient by up to %.2g %% (%d images)",
            *(100 * loss, 100 * gradient, rows),
        )


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
