"""The processes of a run, and what they exchange besides gradients.

torchrun starts one process per device and sets RANK, LOCAL_RANK and WORLD_SIZE; without it there is one process. DDP
averages gradients: NCCL between GPUs, gloo between CPUs.
"""

from __future__ import annotations

import functools
import gc
import importlib
import itertools
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..torchrun import local_rank, rank, world_size

Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """Rank of this process, number of processes, and this process's device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True for rank 0, the only process that writes files and prints."""
        return self.rank == 0

    def gather(self, vector: Tensor) -> Tensor:
        """All-gather: the (L,) vectors of all processes as (size, L)."""
        if self.size == 1:
            return vector.unsqueeze(0)
        rows = [torch.empty_like(vector) for _ in range(self.size)]
        dist.all_gather(rows, vector)
        return torch.stack(rows)

    def sum(self, vector: Tensor) -> Tensor:
        """All-reduce: the sum of the (L,) vectors of all processes."""
        return self.gather(vector).sum(0)

    def copy_buffers(self, module: nn.Module) -> None:
        """Broadcast rank 0's buffers. Training never reads batch-norm statistics, so they are exchanged only here."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)

    def wait(self) -> None:
        """Barrier over all processes."""
        if self.size > 1:
            dist.barrier()

    def on_main(self, task: Callable[[], Result]) -> Result:
        """Run a task on rank 0 only; every process returns its result, which is pickled, or raises its error."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome = [task(), None]
                pickle.dumps(outcome)
            except Exception as error:
                if self.size > 1:
                    dist.broadcast_object_list([None, _picklable(error)], src=0, device=self.device)
                raise
        if self.size > 1:
            dist.broadcast_object_list(outcome, src=0, device=self.device)
        result, fault = outcome
        if fault is not None:
            raise fault
        return cast(Result, result)


def _picklable(error: Exception) -> Exception:
    """The error, or one with its message if other processes could not read it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__} in process 0: {error}")
    return error


_groups = itertools.count()  # every process opens as many
ONE = World(0, 1, torch.device("cpu"))  # a process by itself
TIMEOUT = timedelta(minutes=10)  # of collective operations


@contextmanager
def processes(device: str = "auto") -> Iterator[World]:
    """Process group for the block, configured by torchrun's environment variables.

    No object that holds a replica (`replicate`) may outlive the block.

    Args:
        device: "cpu", "cuda" or "auto" (a GPU if torch sees one). Each process uses the GPU of its local rank.

    Raises:
        ValueError: "cuda" without a GPU, or fewer GPUs than processes on this machine.
    """
    size = world_size()
    world = World(rank(), size, _device(device, local_rank()))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if size == 1:
        yield world
        return
    # Imported before the group exists: its default arguments would keep a reference to the group.
    importlib.import_module("torch.distributed.nn.functional")
    # Under one prefix a group would find the addresses of the group before, and might never come about.
    store = dist.PrefixStore(f"camkd_fast/{next(_groups)}", _store(TIMEOUT))  # type: ignore[attr-defined]
    place: dict[str, Any] = {"store": store, "rank": world.rank, "world_size": size, "timeout": TIMEOUT}
    if world.device.type == "cuda":
        dist.init_process_group("nccl", device_id=world.device, **place)
    else:
        dist.init_process_group("gloo", **place)
    try:
        yield world
    finally:
        # A group that is referenced after this lives until interpreter exit, where its threads sometimes abort.
        gc.collect()
        dist.destroy_process_group()


@functools.cache
def _store(timeout: timedelta) -> Any:
    """Where the processes that torchrun started exchange addresses, for all groups of this process."""
    store, *_ = next(dist.rendezvous("env://", timeout=timeout))  # type: ignore[attr-defined]
    return store


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
        ValueError: the batch size is no multiple of the number of processes.
    """
    if batch_size % world.size:
        raise ValueError(f"batch_size {batch_size} cannot be shared evenly by {world.size} processes")
    return batch_size // world.size


def replicate(module: nn.Module, world: World) -> nn.Module:
    """The module wrapped in DDP; the module itself if there is only one process."""
    if world.size == 1:
        return module
    from torch.nn.parallel import DistributedDataParallel

    replica = DistributedDataParallel(module, gradient_as_bucket_view=True)
    # See World.copy_buffers. Set as an attribute because the argument's name depends on the torch version.
    replica.broadcast_buffers = False
    return replica
