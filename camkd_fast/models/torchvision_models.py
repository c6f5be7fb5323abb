"""torchvision's classifiers with trained weights. torchvision is optional and imported on use."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..errors import first_sentence
from . import checkpoint_files
from .protocol import Source
from .weights import fill, size

PREFIX = "torchvision:"


def pretrained(name: str, weights: str) -> Source:
    """A torchvision classifier with published weights, downloaded or from torch's cache, or with those of a file.

    It does not follow the protocol. Published weights come with mean, std, size and torchvision's names of the classes;
    a file has none of them.

    Args:
        name: as in `torchvision.models.list_models()`.
        weights: name of published weights, such as IMAGENET1K_V2, or a file under torchvision's names, see
            `checkpoint_files.read`, which decides the number of classes.

    Raises:
        OSError: the file cannot be read.
        ValueError: torchvision is not installed, or has no such classifier or weights; published weights can be neither
            found nor downloaded, or are damaged or would run code; or the file is refused or does not fit.
    """
    models = _required(name)
    published = models.get_model_weights(name).__members__
    if weights in published:
        return _published(models, name, published[weights])
    file = Path(weights)
    if not weights or not file.exists():
        known = ", ".join(f"{PREFIX}{name}@{key}" for key in published if key != "DEFAULT") or "none"
        problem = f"there are no weights and no file {weights!r}" if weights else "the weights are missing"
        raise ValueError(f"source {PREFIX}{name}: {problem}; expected {PREFIX}{name}@FILE or {known}")
    tensors = checkpoint_files.read(file)
    classes = _classes(models, name, tensors)
    model = models.get_model(name, weights=None, num_classes=classes)
    model.num_classes = classes
    return Source(fill(model, tensors, PREFIX + name, file), None, None, None, None)


def _published(models: ModuleType, name: str, weights: Any) -> Source:
    spec = f"{PREFIX}{name}@{weights.name}"
    try:
        # Downloads the file and refuses code in it. Then torchvision reads the same file without restriction: only its
        # builders know older names of tensors, and settings that differ from the defaults.
        weights.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
    except OSError as error:
        place = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
        raise ValueError(
            f"the weights of {spec} are not in the cache and cannot be downloaded: download {weights.url} on another "
            f"machine, copy it to {place}, and give {spec} again"
        ) from error
    except Exception as error:  # damage can raise almost anything
        reason = first_sentence(error)
        raise ValueError(f"the weights of {spec} are refused or damaged: {reason}") from error
    model = models.get_model(name, weights=weights)
    transforms, names = weights.transforms(), tuple(weights.meta["categories"])
    height, width = (transforms.crop_size * 2)[:2]  # one number for squares
    mean, std = tuple(map(float, transforms.mean)), tuple(map(float, transforms.std))
    model.num_classes = len(names)
    return Source(model.eval(), mean, std, (height, width), names)


def _classes(models: ModuleType, name: str, tensors: Mapping[str, Tensor]) -> int:
    """Number of classes of a state dict: the size of the tensors whose shapes depend on it in the model."""
    two, three = (_shapes(models, name, n) for n in (2, 3))
    depending = [key for key in two if two[key].shape != three[key].shape]
    return size(tensors, depending[-1], 0)


def _shapes(models: ModuleType, name: str, num_classes: int) -> Mapping[str, Tensor]:
    """The state of a model, without memory where possible: RegNets compute their widths with tensors."""
    try:
        with torch.device("meta"):
            return models.get_model(name, weights=None, num_classes=num_classes).state_dict()  # type: ignore[no-any-return]
    except NotImplementedError:
        return models.get_model(name, weights=None, num_classes=num_classes).state_dict()  # type: ignore[no-any-return]


def _required(name: str) -> ModuleType:
    """torchvision.models, which has a classifier of that name.

    Raises:
        ValueError: torchvision is not installed, or has none.
    """
    try:
        models = importlib.import_module("torchvision.models")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"source {PREFIX + name!r} needs torchvision, which is not installed (pip install 'camkd-fast[teachers]')"
        ) from error
    classifiers = models.list_models(module=models)
    if name not in classifiers:
        nearest = ", ".join(get_close_matches(name, classifiers, n=5)) or "none"
        raise ValueError(f"torchvision has no classifier {name!r}; nearest: {nearest}")
    return models
