"""Processes: who takes part, how they find each other, and what they exchange besides gradients.

torchrun starts one process per device and says in the environment who is who; without it there is one process.
Gradients go through DDP: NCCL between GPUs, gloo between CPUs.
"""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Rank 0, which alone writes files and talks."""
        return self.rank == 0

    def gather(self, vector: Tensor) -> Tensor:
        """Every process's (L,) vector as (size, L), on all of them."""
        if self.size == 1:
            return vector.unsqueeze(0)
        rows = [torch.empty_like(vector) for _ in range(self.size)]
        dist.all_gather(rows, vector)
        return torch.stack(rows)

    def sum(self, vector: Tensor) -> Tensor:
        """The sum over processes of a (L,) vector, on all of them."""
        return self.gather(vector).sum(0)

    def copy_buffers(self, module: nn.Module) -> None:
        """Rank 0's buffers to everybody. Batch-norm statistics are not exchanged while training, which never reads
        them: rank 0's are those of the run."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()

    def broadcast(self, number: int) -> int:
        """Rank 0's number."""
        return int(self.gather(torch.tensor([number], device=self.device))[0])


@contextmanager
def processes(device: str = "auto", timeout: timedelta = timedelta(minutes=10)) -> Iterator[World]:
    """The world that torchrun's environment describes, connected until the end of the block.

    Nothing that holds a replica (`replicate`) may outlive the block.

    Args:
        device: "cpu", "cuda" or "auto", a GPU where there is one. Each process takes the GPU of its local rank.
        timeout: after which a process that waits for a silent one fails.

    Raises:
        ValueError: a GPU is asked for and none is there, or fewer than processes on this machine.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    world = World(rank, size, _device(device, int(os.environ.get("LOCAL_RANK", "0"))))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if size == 1:
        yield world
        return
    # DDP imports this module, whose default arguments would hold the group that exists by then beyond its end.
    importlib.import_module("torch.distributed.nn.functional")
    if world.device.type == "cuda":
        dist.init_process_group("nccl", timeout=timeout, device_id=world.device)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    try:
        yield world
    finally:
        # A group that something still holds ends with the interpreter, and now and then its threads abort the process.
        gc.collect()
        dist.destroy_process_group()


def _device(name: str, local_rank: int) -> torch.device:
    count = torch.cuda.device_count()
    if name == "cpu" or (name == "auto" and count == 0):
        return torch.device("cpu")
    if local_rank >= count:
        raise ValueError(f"process {local_rank} of this machine needs a GPU of its own, but torch sees {count}")
    return torch.device("cuda", local_rank)


def share_of_batch(batch_size: int, world: World) -> int:
    """Images per step of one process.

    Raises:
        ValueError: the processes cannot share a step's images evenly.
    """
    if batch_size % world.size:
        raise ValueError(f"batch_size {batch_size} cannot be shared evenly by {world.size} processes")
    return batch_size // world.size


def replicate(module: nn.Module, world: World) -> nn.Module:
    """The module under DDP, which averages gradients over the processes; the module itself when there is one."""
    if world.size == 1:
        return module
    from torch.nn.parallel import DistributedDataParallel

    replica = DistributedDataParallel(module, gradient_as_bucket_view=True)
    # See World.copy_buffers. As an argument it has another name in another torch; either way buffers start equal.
    replica.broadcast_buffers = False
    return replica
