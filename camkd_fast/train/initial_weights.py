"""The model that a run trains, with random weights or, by `--init`, with those of a source."""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

import torch
from torch import nn

from .. import models
from ..data.files import ImageSet
from ..models import sources, weights
from ..models.split import LogitsOnly, Split
from ..models.timm_models import PatchTokens, TrailingChannels
from . import run_folder
from .config import JobConfig
from .distributed import World
from .source_strings import SourceString
from .teachers.teacher_hash import update_by_state


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
        As `models.create` and `initialise`.
    """
    torch.manual_seed(config.seed)
    model = models.create(name, images.num_classes, images.channels)
    if config.init is None or world.broadcast(resume and run_folder.has_checkpoint(config)):
        return model, {}
    origin = initialise(model, name, config.init, images.num_classes)
    return model, {"kind": "init", "step": 1, "epoch": 1, **origin}


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
    theirs, own = _bare(found.model).state_dict(), _bare(model).state_dict()
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
    weights.fill(_bare(model), {**theirs, **{name: own[name] for name in drawn}}, name, source)
    model.train()
    if drawn:
        warnings.warn(
            f"the classifier of {source} has {found.num_classes} classes, but the images have {num_classes}: "
            f"{', '.join(drawn)} are drawn anew",
            stacklevel=2,
        )
    return {"source": str(source), "sha256": digest.hexdigest(), "classifier": "drawn" if drawn else "taken"}


def _bare(model: nn.Module) -> nn.Module:
    """A model without the wrapper that gives it the protocol, which is not part of its parameters' names."""
    while isinstance(model, (LogitsOnly, PatchTokens, TrailingChannels)):
        model = model.model
    return model
