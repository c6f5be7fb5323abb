"""A trained model as a safetensors file with its metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from . import create

FORMAT = 1
MODEL = "model.safetensors"  # in a run folder and in its checkpoints
AVERAGED_MODEL = "model_ema.safetensors"  # in the folder of a run that averages its student
# One key only: safetensors writes several in random order, and equal models must give equal bytes.
_METADATA = "camkd_fast"


class CheckpointError(RuntimeError):
    """A checkpoint or model file is damaged, or was not written by camkd-fast."""


class TrainedModel(NamedTuple):
    """A model in evaluation mode on the CPU, and the metadata of its file."""

    model: nn.Module
    metadata: dict[str, Any]


def model_bytes(model: nn.Module, metadata: Mapping[str, Any]) -> bytes:
    """The model's parameters and buffers as a safetensors file; equal models give equal bytes."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    return save(tensors, {_METADATA: json.dumps({"format": FORMAT, **metadata}, sort_keys=True)})


def read_model(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a model file.

    Raises:
        OSError: the file cannot be read.
        CheckpointError: it is damaged, or was not written by camkd-fast.
    """
    return parse_model(path, path.read_bytes())


def parse_model(path: Path, data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a model file from its bytes; `path` is for errors.

    Raises:
        CheckpointError: as `read_model`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        written = header["__metadata__"][_METADATA]
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    except KeyError as error:
        raise CheckpointError(f"{path} is no model of camkd-fast: it lacks the metadata {error}") from error
    return tensors, _metadata(path, written)


def _metadata(path: Path, written: str) -> dict[str, Any]:
    try:
        metadata: dict[str, Any] = json.loads(written)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: its metadata are not JSON: {error}") from error
    found = metadata.get("format") if isinstance(metadata, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"{path} has format {found!r}, but this version reads format {FORMAT}")
    return metadata


def load_model(path: Path) -> TrainedModel:
    """The model of a file.

    Raises:
        OSError: the file cannot be read.
        CheckpointError: it is damaged, was not written by camkd-fast, or its tensors do not fit its model.
        ValueError: unknown model name.
    """
    tensors, metadata = read_model(path)
    if missing := [name for name in ("model", "num_classes", "in_channels") if name not in metadata]:
        raise CheckpointError(f"{path} is damaged: its metadata lack {', '.join(missing)}")
    model = create(metadata["model"], metadata["num_classes"], metadata["in_channels"])
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} does not fit {metadata['model']}: {reason}") from error
    return TrainedModel(model.eval(), metadata)
