"""Where the parameters of a model lie: on one device of this process, spread by accelerate, or shared by processes."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from .wrappers import unwrapped


def is_sharded(teacher: Any) -> bool:
    """Whether other processes wait for this one in the teacher's forward."""
    return isinstance(teacher, nn.Module) and any(isinstance(parameter, DTensor) for parameter in teacher.parameters())


def can_move(model: nn.Module) -> bool:
    """Whether a model lies in full where it was put, so that it may be moved to one device.

    accelerate gives a model on a single device no hooks, which would move its inputs. bitsandbytes refuses to move one
    that it has quantized and placed.
    """
    bare = unwrapped(model)
    fixed = getattr(bare, "is_quantized", False) and getattr(bare, "hf_device_map", None) is not None
    return _is_whole(model) and not _is_hooked(model) and not fixed


def can_run(model: nn.Module) -> bool:
    """Whether this process has all parameters of a model, or accelerate's hooks load them when it runs."""
    return _is_whole(model) or (_is_hooked(model) and not is_sharded(model))


def _is_hooked(model: nn.Module) -> bool:
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def _is_whole(model: nn.Module) -> bool:
    loaded = all(parameter.numel() > 0 and not parameter.is_meta for parameter in model.parameters())
    return loaded and not is_sharded(model)
