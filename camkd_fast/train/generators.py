"""The default random generators, from which modules draw in the forward pass."""

from __future__ import annotations

import hashlib

import torch


def default_generator(device: torch.device) -> torch.Generator:
    """The one of this device; of GPUs, of the current one."""
    if device.type == "cuda":
        return torch.cuda.default_generators[torch.cuda.current_device()]
    return torch.default_generator


def seed_generators(device: torch.device, *key: int) -> None:
    """Seed those of the CPU and of `device` with a hash of `key`; 100 us faster than torch.manual_seed."""
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "little")
    for generator in {torch.default_generator, default_generator(device)}:
        generator.manual_seed(seed)
