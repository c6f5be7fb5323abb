"""Teachers from anywhere: one string names a trained model and how its images are prepared.

| source | model |
|---|---|
| `runs/t0` | of a run folder, or a model file of one |
| `resnet32x4@FILE` | of the zoo, with a state dict of RepDistiller, CA-MKD or this package |
| `timm:resnet50.a1_in1k`, `timm:NAME@FILE` | timm's, with pretrained weights or a state dict |
| `torchvision:resnet50@IMAGENET1K_V2`, `torchvision:NAME@FILE` | torchvision's, likewise |
| `hf:ORG/NAME`, `hf:FOLDER` | transformers' AutoModelForImageClassification |
| `py:package.module:function` | what the function returns |

`#MODULE` at the end names the module whose output is the feature map; `?mean=0.5,0.5,0.5&std=0.2,0.2,0.2&size=32` says
what a source does not know of its images.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from . import checkpoint_files, hf_models, model_file, names, rep_distiller, timm_models, torchvision_models, zoo_name
from .preprocessing import Preprocessing
from .protocol import FeatureModel, Source
from .split import LogitsOnly, Split, split

PYTHON = "py:"
_OPTIONS = re.compile(r"\?(\w+=[^?&#@]*(?:&\w+=[^?&#@]*)*)$")
_LAYER = re.compile(r"#([A-Za-z_][\w.]*)$")
_SIZE = (224, 224)  # of the image that checks a split model, if the source does not know its size


def load(spec: str, num_classes: int | None = None) -> Source:
    """The teacher that a string names; its forms are in the table of this module.

    No pickle is opened that could run code; `py:` imports the caller's. torch's random numbers stay as they are.

    Args:
        spec: in `NAME@FILE` the first @ counts. A path that exists with its # or ? is taken whole.
        num_classes: number of logits that are needed; None: any. A model may have more if it knows the names of its
            classes, by which some can be chosen.

    Raises:
        OSError: a file cannot be read.
        CheckpointError: the model file of a run is damaged.
        ValueError: the string has none of the forms; an optional package is missing, which the message names; weights
            can be neither found nor downloaded, in which case it says what to download and where to put it; a file is
            refused or does not fit; the model cannot be split at the module; an option is wrong; or numbers of classes
            differ.
    """
    kind = _kind(spec)
    parts = _parts(spec, spec.removeprefix(kind))
    with torch.random.fork_rng(devices=[]):
        found = replace(_KINDS[kind](parts.rest), **parts.options)
        source = replace(found, model=_with_protocol(spec, kind, parts, found).eval())
    known = source.num_classes
    if source.classes is not None and known is not None and len(source.classes) != known:
        raise ValueError(f"source {spec} has {known} classes, but names for {len(source.classes)}")
    if num_classes is not None and known is not None and known != num_classes:
        chosen = source.classes is not None and known > num_classes
        if not chosen:
            raise ValueError(f"source {spec} has {known} classes, but {num_classes} are needed")
    return source


# --- the string ------------------------------------------------------------------------------------------------------


def split_path(spec: str) -> tuple[str, str]:
    """A string in two parts, the second of which is a path or a name without special characters; it may be empty."""
    kind = _kind(spec)
    rest = spec.removeprefix(kind)
    name, at, file = rest.partition("@")
    if kind in (timm_models.PREFIX, torchvision_models.PREFIX) or (not kind and at and zoo_name(name) is not None):
        return f"{kind}{name}{at}", file
    return (spec, "") if kind == PYTHON else (kind, rest)


def _kind(spec: str) -> str:
    """The prefix of a string; empty for runs and models of the zoo."""
    return next(kind for kind in _KINDS if spec.startswith(kind))


class _Parts(NamedTuple):
    rest: str  # without the kind, the module and the options
    layer: str | None
    options: dict[str, Any]  # fields of Source


def _parts(spec: str, rest: str) -> _Parts:
    layer: str | None = None
    options: dict[str, Any] = {}
    while not Path(rest.partition("@")[2] or rest).exists():
        if not options and (found := _OPTIONS.search(rest)):
            options = _options(spec, found[1])
        elif layer is None and (found := _LAYER.search(rest)):
            layer = found[1]
        else:
            break
        rest = rest[: found.start()]
    if rest.endswith("@") or not rest:
        raise ValueError(f"source {spec!r} lacks a name or a file")
    return _Parts(rest, layer, options)


def _options(spec: str, text: str) -> dict[str, Any]:
    """Mean, std and size from `mean=...&std=...&size=...`."""
    given = dict(item.split("=", 1) for item in text.split("&"))
    if unknown := given.keys() - {"mean", "std", "size"}:
        raise ValueError(f"source {spec}: the options are mean, std and size, got {sorted(unknown)[0]!r}")
    options: dict[str, Any] = {}
    try:
        for key in given.keys() & {"mean", "std"}:
            options[key] = tuple(map(float, given[key].split(",")))
        if "size" in given:
            options["size"] = _pair([int(n) for n in given["size"].split(",")])
    except ValueError as error:
        raise ValueError(f"source {spec}: expected numbers separated by commas, got {text!r}") from error
    _check(spec, options)
    return options


def _pair(size: Any) -> tuple[int, int]:
    """(H, W) from one number or two."""
    numbers = [size] if isinstance(size, int) else list(size)
    height, width = numbers * 2 if len(numbers) == 1 else numbers
    return int(height), int(width)


def _check(spec: str, options: dict[str, Any]) -> None:
    try:
        Preprocessing(options.get("mean"), options.get("std"), options.get("size"))
    except ValueError as error:
        raise ValueError(f"source {spec}: {error}") from error


# --- kinds of sources ------------------------------------------------------------------------------------------------


def _run_or_zoo(rest: str) -> Source:
    name, at, file = rest.partition("@")
    if at and (known := zoo_name(name)) is not None:
        return Source(rep_distiller.load(name, checkpoint_files.read(Path(file)), file), architecture=known)
    path = Path(rest)
    if path.exists():
        return _run(path / model_file.MODEL if path.is_dir() else path)
    if at:
        nearest = ", ".join(get_close_matches(name, names(), n=5) or names())
        raise ValueError(f"source {rest}: the zoo has no model {name!r}; nearest: {nearest}")
    forms = "a run folder, NAME@FILE, timm:NAME, torchvision:NAME@WEIGHTS, hf:ORG/NAME or py:MODULE:FUNCTION"
    raise ValueError(f"source {rest} does not exist: expected {forms}")


def _run(path: Path) -> Source:
    if not path.exists():
        raise FileNotFoundError(f"source {path.parent} has no trained model: {path} does not exist")
    model, metadata = model_file.load_model(path)
    mean, std = (tuple(level / 255 for level in metadata[key]) for key in ("mean", "std"))
    classes, size = metadata.get("class_names"), metadata.get("size")  # earlier versions lack the names
    known = tuple(classes) if classes else None
    return Source(model, mean, std, _pair(size) if size else None, known, metadata["model"])


def _timm(rest: str) -> Source:
    name, at, file = rest.partition("@")
    return replace(timm_models.pretrained(name, Path(file) if at else None), architecture=timm_models.PREFIX + name)


def _torchvision(rest: str) -> Source:
    name, _, weights = rest.partition("@")
    return replace(torchvision_models.pretrained(name, weights), architecture=torchvision_models.PREFIX + name)


def _python(rest: str) -> Source:
    """Calls the user's function. What its model says of its images in tensors is part of the model, and not read."""
    path, _, name = rest.partition(":")
    if not path or not name:
        raise ValueError(f"source {PYTHON}{rest}: expected {PYTHON}package.module:function")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(path), name, None)
        model = function() if callable(function) else None
    except ModuleNotFoundError as error:
        raise ValueError(f"source {PYTHON}{rest}: {error}") from error
    except (Exception, SystemExit) as error:  # of any kind, it is the caller's code
        raise ValueError(f"source {PYTHON}{rest} raised {_named(error)}") from error
    finally:
        sys.path.remove(here)
    if not callable(function):
        raise ValueError(f"source {PYTHON}{rest}: {path} has no function {name!r}")
    if not isinstance(model, nn.Module):
        raise ValueError(f"source {PYTHON}{rest} must return an nn.Module, got {type(model).__name__}")
    options = _attributes(PYTHON + rest, model)
    _check(PYTHON + rest, options)
    return Source(model, **options, architecture=type(model).__name__)


def _attributes(spec: str, model: nn.Module) -> dict[str, Any]:
    """Mean, std, size and classes, as far as the user's model has attributes of these names."""
    readers: dict[str, Callable[[Any], Any]] = {"mean": _numbers, "std": _numbers, "size": _pair, "classes": tuple}
    options: dict[str, Any] = {}
    for key, read in readers.items():
        value = getattr(model, key, None)
        if isinstance(value, (int, float, str, tuple, list)):
            try:
                options[key] = read(value)
            except (TypeError, ValueError) as error:
                raise ValueError(f"source {spec}: {key} of its model is {value!r}: {error}") from error
    return options


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _numbers(values: Any) -> tuple[float, ...]:
    return (float(values),) if isinstance(values, (int, float)) else tuple(map(float, values))


_KINDS: dict[str, Callable[[str], Source]] = {
    timm_models.PREFIX: _timm,
    torchvision_models.PREFIX: _torchvision,
    hf_models.PREFIX: hf_models.pretrained,
    PYTHON: _python,
    "": _run_or_zoo,
}


# --- the protocol ----------------------------------------------------------------------------------------------------


def _with_protocol(spec: str, kind: str, parts: _Parts, found: Source) -> nn.Module:
    model = found.model.eval()
    if parts.layer is not None:
        return _split(parts.layer, found)
    if kind == timm_models.PREFIX:
        try:
            return timm_models.with_map(model, parts.rest.partition("@")[0])
        except ValueError as error:
            return LogitsOnly(model, str(error))
    if isinstance(model, FeatureModel):
        return model
    return LogitsOnly(model, f"no module of {spec} is named for it, as in {kind}{parts.rest}#MODULE")


def _split(layer: str, found: Source) -> Split:
    model = found.model
    if isinstance(model, hf_models.LogitsOfOutput):
        layer = f"model.{layer}"
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    # Not zeros, which hide errors, and not random numbers.
    height, width = found.size or _SIZE
    pixels = torch.linspace(-1, 1, channels * height * width).mul(1000).sin()
    return split(model, layer, pixels.view(1, channels, height, width))
