"""Models as safetensors, and checkpoints of a run.

A checkpoint is a folder `step-00001234` with `model.safetensors`, `state.pt` (a dict that torch.load reads with
weights_only=True) and `manifest.json`, the sha256 of both. It is written under another name and renamed, so it is there
in full or not at all.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .atomic import sync_folder, write_synced

FORMAT = 1
KEEP = 2  # checkpoints of a run that stay on the disk
MODEL, STATE, MANIFEST = "model.safetensors", "state.pt", "manifest.json"
_METADATA = "camkd_fast"  # safetensors writes several keys in random order; one key keeps files equal byte for byte


class CheckpointError(RuntimeError):
    """A checkpoint or model file is damaged or not ours."""


# --- models ----------------------------------------------------------------------------------------------------------


def model_bytes(model: nn.Module, metadata: Mapping[str, Any]) -> bytes:
    """The model's parameters and buffers as a safetensors file; equal models give equal bytes."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    return save(tensors, {_METADATA: json.dumps({"format": FORMAT, **metadata}, sort_keys=True)})


def read_model(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a model file.

    Raises:
        OSError: the file cannot be read.
        CheckpointError: it is damaged, or no model of ours.
    """
    return _parse_model(path, path.read_bytes())


def _parse_model(path: Path, data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata: dict[str, Any] = json.loads(header["__metadata__"][_METADATA])
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    except KeyError as error:
        raise CheckpointError(f"{path} is no model of camkd-fast: it lacks the metadata {error}") from error
    if metadata["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {metadata['format']}, but this version reads format {FORMAT}")
    return tensors, metadata


# --- checkpoints of a run --------------------------------------------------------------------------------------------


class Checkpoint(NamedTuple):
    path: Path
    step: int
    model: dict[str, Tensor]
    state: dict[str, Any]


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in folder `path`, once its bytes are known to be those that were written.

    Raises:
        CheckpointError: a file is missing, truncated or changed, or the state holds anything but plain data.
    """
    try:
        content = {name: (path / name).read_bytes() for name in (MANIFEST, MODEL, STATE)}
        manifest = json.loads(content[MANIFEST])
        for name in (MODEL, STATE):
            if hashlib.sha256(content[name]).hexdigest() != manifest[name]:
                raise CheckpointError(f"{path / name} is damaged: its {len(content[name])} bytes are not those written")
        model, _ = _parse_model(path / MODEL, content[MODEL])
        state = torch.load(io.BytesIO(content[STATE]), map_location="cpu", weights_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path / STATE} holds more than plain data and is refused: {reason}") from error
    return Checkpoint(path, state["step"], model, state)


class Checkpoints:
    """The checkpoints of one run, of which the last `KEEP` stay.

    Args:
        folder: made when the first one is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def paths(self) -> list[Path]:
        """Newest first, whether intact or not."""
        return sorted(self.folder.glob("step-*"), reverse=True)

    def save(self, step: int, model: bytes, state: Mapping[str, Any]) -> Path:
        """Write one and remove the oldest beyond `KEEP`.

        Raises:
            OSError: it could not be written; the ones before are untouched and the last is named.
        """
        path = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".{path.name}.{os.getpid()}"
        buffer = io.BytesIO()
        torch.save({"step": step, **state}, buffer)
        files = {MODEL: model, STATE: buffer.getvalue()}
        manifest = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        try:
            self._remove_unfinished()
            temporary.mkdir(parents=True)
            for name, data in {**files, MANIFEST: json.dumps(manifest).encode()}.items():
                write_synced(temporary / name, data)
            sync_folder(temporary)
            for passed in self.paths():
                if passed >= path:  # damaged: the run was resumed from one before it
                    shutil.rmtree(passed)
            os.rename(temporary, path)
            sync_folder(self.folder)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            last = next(iter(self.paths()), "none")
            message = f"cannot write checkpoint {path}: {error.strerror}; the last good one is {last}"
            raise OSError(error.errno, message) from error
        for old in self.paths()[KEEP:]:
            shutil.rmtree(old)
        return path

    def _remove_unfinished(self) -> None:
        """What a killed process left under its temporary name."""
        for left in self.folder.glob(".step-*"):
            shutil.rmtree(left, ignore_errors=True)

    def latest(self) -> Checkpoint | None:
        """The newest intact checkpoint, or None where none was ever written.

        A damaged one is named in a warning along with the one that is taken instead.

        Raises:
            CheckpointError: there are checkpoints, and all of them are damaged.
        """
        faults: list[CheckpointError] = []
        for path in self.paths():
            try:
                found = read_checkpoint(path)
            except CheckpointError as error:
                faults.append(error)
                continue
            for fault in faults:
                warnings.warn(f"{fault}; taking the one before it, {path}", stacklevel=2)
            return found
        if faults:
            raise CheckpointError("; ".join(map(str, faults)) + "; no checkpoint before it is left")
        return None
