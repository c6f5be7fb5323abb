"""The environment variables of torchrun, which starts one process per device, on one machine or several."""

from __future__ import annotations

import os


def rank() -> int:
    """Rank of this process among all processes; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Rank of this process among the processes of this machine; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Number of processes on all machines; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def processes_here() -> int:
    """Number of processes on this machine; 1 without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size())))
