"""Checkpoints of a run.

A checkpoint is a folder `step-00001234` with `model.safetensors`, `state.pt` (a dict that torch.load reads with
weights_only=True) and `manifest.json`, the sha256 of both. It is written under a temporary name and renamed, hence
never incomplete.
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
from torch import Tensor

from ..errors import first_line
from ..models.model_file import MODEL, CheckpointError, parse_model
from ..system import replace, sync_folder
from .atomic import write_synced

KEEP = 2  # checkpoints kept per run
STATE, MANIFEST = "state.pt", "manifest.json"


class Checkpoint(NamedTuple):
    path: Path
    step: int
    model: dict[str, Tensor]
    state: dict[str, Any]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the checkpoint in folder `path` and verify its hashes.

    Raises:
        CheckpointError: a file is missing, truncated or changed, or the state needs more than weights_only=True.
    """
    try:
        content = {name: (path / name).read_bytes() for name in (MANIFEST, MODEL, STATE)}
        manifest = json.loads(content[MANIFEST])
        if not isinstance(manifest, dict):
            raise CheckpointError(f"{path / MANIFEST} is damaged: it holds no hashes, but {manifest!r}")
        for name in (MODEL, STATE):
            if hashlib.sha256(content[name]).hexdigest() != manifest[name]:
                raise CheckpointError(f"{path / name} is damaged: its {len(content[name])} bytes do not match its hash")
        model, _ = parse_model(path / MODEL, content[MODEL])
        state = torch.load(io.BytesIO(content[STATE]), map_location="cpu", weights_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    except pickle.UnpicklingError as error:
        refusal = f"{path / STATE} needs more than weights_only=True and is refused: {first_line(error)}"
        raise CheckpointError(refusal) from error
    return Checkpoint(path, state["step"], model, state)


class Checkpoints:
    """The checkpoints of one run; the last `KEEP` are kept.

    Args:
        folder: created with the first checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def paths(self) -> list[Path]:
        """All checkpoints, newest first, damaged ones included."""
        return sorted(self.folder.glob("step-*"), reverse=True)

    def save(self, step: int, model: bytes, state: Mapping[str, Any]) -> Path:
        """Write a checkpoint and remove all but the last `KEEP`.

        Raises:
            OSError: it could not be written; earlier ones are unchanged, and the message names the last.
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
                if passed >= path:  # damaged, since the run was resumed from an earlier one
                    shutil.rmtree(passed)
            replace(temporary, path)
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
        """Remove temporary folders of killed processes."""
        for left in self.folder.glob(".step-*"):
            shutil.rmtree(left, ignore_errors=True)

    def latest(self) -> Checkpoint | None:
        """The newest intact checkpoint; None if there are no checkpoints.

        Warns about each damaged checkpoint that it skips.

        Raises:
            CheckpointError: all checkpoints are damaged.
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
