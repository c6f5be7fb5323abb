"""The list of loaders and the choice among them. `explain` gives the reason for a choice."""

from __future__ import annotations

import importlib.util

import torch

from ..system import available_memory
from .batch import Loader, LoaderConfig
from .files import ImageSet
from .images import LabelledImages

KINDS = ("resident", "dali", "torch")
_RESIDENT_FRACTION = 0.5  # of free device memory that images may take; models and activations need the rest
_FOREIGN_FRACTION = 0.1  # of files that DALI would leave to Pillow, which then decodes all in worker processes


def loader(data: ImageSet, config: LoaderConfig, kind: str = "auto") -> Loader:
    """Create a loader of the given kind, or of the kind that suits the data and the machine.

    Args:
        kind: "auto", "resident" (arrays on the device), "dali" or "torch" (DataLoader).

    Raises:
        ValueError: the kind is unknown, or the settings do not fit the data.
        NotImplementedError: the kind cannot run here; the message gives the reason.
    """
    if kind == "auto":
        kind, _ = pick(data, config)
    elif kind not in KINDS:
        raise ValueError(f"loader must be one of {('auto', *KINDS)}, got {kind!r}")
    elif refusal := _refusal(kind, data, config):
        raise NotImplementedError(f"loader {kind!r} cannot run here: {refusal}")
    if kind == "resident" and isinstance(data, LabelledImages):
        from .resident import ResidentLoader

        return ResidentLoader(data, config)
    if kind == "dali":
        from .dali_loader import DaliLoader

        return DaliLoader(data, config)
    from .torch_loader import TorchLoader

    return TorchLoader(data, config)


def explain(data: ImageSet, config: LoaderConfig) -> str:
    """The loader that "auto" picks and the reason, in one line."""
    return "{}: {}".format(*pick(data, config))


def pick(data: ImageSet, config: LoaderConfig) -> tuple[str, str]:
    """The kind that "auto" picks here, and the reason."""
    if isinstance(data, LabelledImages):
        need, free = _resident_bytes(data, config), free_bytes(config.device)
        sizes = f"{need / 1e6:.0f} MB of images, {free / 1e6:.0f} MB free on {config.device}"
        if need <= _RESIDENT_FRACTION * free:
            return "resident", sizes
        return "torch", f"{sizes}, of which resident images may take {_RESIDENT_FRACTION:.0%}"
    if refusal := _refusal("dali", data, config):
        return "torch", refusal
    foreign = (~data.headers().exact).nonzero()[0]
    if len(foreign) > _FOREIGN_FRACTION * len(data):
        first = data.paths[foreign[0]]
        return "torch", f"{len(foreign)} of {len(data)} files are not of a kind that DALI reads, the first is {first}"
    return "dali", f"{len(data)} image files to decode"


def _refusal(kind: str, data: ImageSet, config: LoaderConfig) -> str | None:
    """The reason why a kind cannot run here; None if it can."""
    if kind == "resident":
        if not isinstance(data, LabelledImages):
            return f"{len(data)} image files are not in memory"
        need, free = _resident_bytes(data, config), free_bytes(config.device)
        return f"{need} bytes of images, {free} bytes free on {config.device}" if need > free else None
    if kind == "dali":
        if config.device.type not in ("cpu", "cuda"):
            return f"DALI supports cpu and cuda, not {config.device.type}"
        if not _installed("nvidia.dali"):
            return "NVIDIA DALI is not installed (pip install 'camkd-fast[dali]')"
    return None


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is not installed
        return False


def _resident_bytes(data: LabelledImages, config: LoaderConfig) -> int:
    """Size of the copy that the resident loader makes on the device."""
    a = config.augmentation
    border = 2 * a.padding if a is not None and a.kind == "crop" else 0
    C, H, W = data.shape
    return len(data) * C * (H + border) * (W + border)


def free_bytes(device: torch.device) -> int:
    """Free memory in bytes: of a CUDA device, or of the host for any other device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory()
