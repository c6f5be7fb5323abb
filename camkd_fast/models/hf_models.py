"""Image classifiers of Hugging Face's transformers. transformers is optional and imported on use."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from ..errors import first_sentence
from .protocol import Source

PREFIX = "hf:"


class LogitsOfOutput(nn.Module):
    """A transformers model as a function of images (N, channels, H, W) that returns logits (N, C)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.num_classes: int = model.config.num_labels

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=x).logits
        return logits


def pretrained(name: str) -> Source:
    """An image classifier from the hub, its cache or a folder. Code of a repository is never run.

    Weights in half precision become float32. Mean, std and size are the image processor's, if there is one. Names of
    classes are the config's, unless they are placeholders.

    Args:
        name: ORG/NAME of the hub, or a folder with config.json and weights.

    Raises:
        ValueError: transformers is not installed; the model can be neither found nor downloaded, is no image classifier
            of transformers, or has weights that would run code; or its image processor cannot be used.
    """
    transformers = _transformers(name)
    try:
        model = transformers.AutoModelForImageClassification.from_pretrained(name, trust_remote_code=False)
    except OSError as error:
        if Path(name).is_dir():
            raise ValueError(f"{PREFIX}{name} cannot be read: {first_sentence(error)}") from error
        raise ValueError(
            f"{PREFIX}{name} is no folder, and the hub's model is not in the cache and cannot be downloaded: download "
            f"config.json, preprocessor_config.json and model.safetensors of huggingface.co/{name} on another machine, "
            f"copy them to a folder here, and give {PREFIX}FOLDER"
        ) from error
    except (ValueError, ImportError) as error:
        reason = first_sentence(error)
        raise ValueError(f"{PREFIX}{name} is no image classifier of transformers: {reason}") from error
    except Exception as error:  # of several libraries
        reason = first_sentence(error)
        raise ValueError(f"the weights of {PREFIX}{name} are refused or damaged: {reason}") from error
    classes = tuple(model.config.id2label[i] for i in range(model.config.num_labels))
    known = None if any(label == f"LABEL_{i}" for i, label in enumerate(classes)) else classes
    preparation = _preparation(transformers, name)
    return Source(LogitsOfOutput(model.float().eval()), *preparation, known, type(model).__name__)


def _preparation(
    transformers: ModuleType, name: str
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None, tuple[int, int] | None]:
    """Mean, std and (H, W) of the image processor; None if there is none."""
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except OSError:
        return None, None, None
    except (ValueError, ImportError) as error:
        reason = first_sentence(error)
        raise ValueError(f"the image processor of {PREFIX}{name} cannot be used: {reason}") from error
    size = _size(processor)
    if not processor.do_normalize:
        return (0.0,), (1.0,), size
    # It computes (level * factor - offset - mean) / std; here levels are divided by 255 first.
    factor = 255 * (processor.rescale_factor if processor.do_rescale else 1.0)
    offset = 1.0 if getattr(processor, "rescale_offset", False) else 0.0  # EfficientNet's
    repeats = 2 if getattr(processor, "include_top", False) else 1  # likewise: it divides by std once more
    mean = tuple((value + offset) / factor for value in processor.image_mean)
    return mean, tuple(value**repeats / factor for value in processor.image_std), size


def _size(processor: Any) -> tuple[int, int] | None:
    """(H, W) after resizing and cropping."""
    cropped = bool(getattr(processor, "do_center_crop", False) and processor.crop_size)
    size = processor.crop_size if cropped else processor.size
    if not size:
        return None
    height, width = (size.get(key) or size.get("shortest_edge") for key in ("height", "width"))
    return (int(height), int(width)) if height and width else None


def _transformers(name: str) -> ModuleType:
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"source {PREFIX + name!r} needs transformers, which is not installed (pip install 'camkd-fast[teachers]')"
        ) from error
