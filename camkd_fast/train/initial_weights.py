"""The model that a run trains, checked on one image, with random weights or, by `--init`, with those of a source."""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

import torch
from torch import nn

from .. import models
from ..data.files import ImageSet
from ..errors import first_line
from ..models import sources, weights
from ..models.protocol import inner_model
from ..models.split import LogitsOnly, Split
from . import run_folder, strategies
from .config import DistillConfig, JobConfig
from .distributed import World
from .source_strings import SourceString
from .teachers.teacher_hash import update_by_state


class ImageSizeError(ValueError):
    """A model cannot take images of the data set's size."""


def first_model(
    config: JobConfig, name: str, images: ImageSet, resume: bool, world: World
) -> tuple[nn.Module, dict[str, Any]]:
    """The model that a run trains, before its first step.

    A run that has a checkpoint to resume from does not read its initial weights again.

    Args:
        name: of the model.

    Returns:
        The model, and a record of its initial weights for metrics.jsonl; else an empty one.

    Raises:
        ImageSizeError: the model cannot take the images; the message has both sizes and says what to do.
        ValueError: the strategy needs a feature map that the student lacks.
        As `models.create` and `initialise`.
    """
    torch.manual_seed(config.seed)
    model = models.create(name, images.num_classes, images.channels)
    _check_images(model, name, config, images)
    if isinstance(config, DistillConfig) and isinstance(model, LogitsOnly):
        strategies.refuse_logits_only(f"student {name}", model.reason, strategies.find(config.strategy))
    if config.init is None or world.on_main(lambda: resume and run_folder.has_checkpoint(config)):
        return model, {}
    origin = initialise(model, name, config.init, images.num_classes)
    return model, {"kind": "init", "step": 1, "epoch": 1, **origin}


@torch.no_grad()
def _check_images(model: nn.Module, name: str, config: JobConfig, images: ImageSet) -> None:
    """Run one image before training; draws no random numbers."""
    _, height, width = images.shape
    with torch.random.fork_rng(devices=[]):
        try:
            model.eval()(torch.zeros(1, *images.shape))
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # of the model's code, of any type
            size = (getattr(inner_model(model), "pretrained_cfg", None) or {}).get("input_size", (None, None, None))[1:]
            known = f" (its own size is {size[0]}x{size[1]})" if size[0] else ""
            if config.data.data == "digits":
                advice = "digits take no --size: choose a model for small images, or another data set"
            elif size[0] and size[0] == size[1]:
                advice = f"use --size {size[0]}, or another model"
            else:
                advice = "use another --size, or a model that shrinks images less"
            raise ImageSizeError(
                f"model {name}{known} cannot take images of {height}x{width} pixels "
                f"({first_line(error).rstrip('.')}): {advice}"
            ) from error
        finally:
            model.train()


def initialise(model: nn.Module, name: str, source: SourceString, num_classes: int) -> dict[str, Any]:
    """Copy the weights of a source of the same architecture into a model, in place; draws no random numbers.

    A classifier of another number of classes keeps the weights that were drawn for it, with a warning.

    Args:
        name: of the model, for errors.

    Returns:
        What to record: the source, the sha256 of its weights, and whether its classifier was taken.

    Raises:
        ValueError, OSError, CheckpointError: as `sources.load`; or names or shapes differ elsewhere, in which case the
            message has up to ten names of each side.
    """
    found = sources.load(source)
    if isinstance(found.model, Split):
        raise ValueError(f"initial weights {source} are those of a whole model: leave out the #MODULE")
    theirs, own = inner_model(found.model).state_dict(), inner_model(model).state_dict()
    drawn = [
        name
        for name, tensor in theirs.items()
        if name in own
        and tensor.shape != own[name].shape
        and found.num_classes != num_classes
        and tensor.shape[:1] == (found.num_classes,)
        and own[name].shape[:1] == (num_classes,)
        and tensor.shape[1:] == own[name].shape[1:]
    ]
    digest = hashlib.sha256()
    update_by_state(digest, theirs)
    weights.fill(inner_model(model), {**theirs, **{name: own[name] for name in drawn}}, name, source)
    model.train()
    if drawn:
        warnings.warn(
            f"the classifier of {source} has {found.num_classes} classes, but the images have {num_classes}: "
            f"{', '.join(drawn)} are drawn anew",
            stacklevel=2,
        )
    return {"source": str(source), "sha256": digest.hexdigest(), "classifier": "drawn" if drawn else "taken"}
