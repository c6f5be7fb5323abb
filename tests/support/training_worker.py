"""One rank of a data-parallel job, configured by torchrun's environment variables.

`python -m tests.support.training_worker JOB FOLDER [VICTIM STEP]`
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from camkd_fast.data.batch import Batch
from camkd_fast.models.model_file import model_bytes
from camkd_fast.train.config import LogConfig, PrecisionConfig
from camkd_fast.train.distributed import World, processes
from camkd_fast.train.journal import Journal, NullJournal
from camkd_fast.train.run_folder import RunExistsError
from camkd_fast.train.step import TrainStep
from tests.support.training import EAGER, ONE, OPTIM, SmallNet, batch, images, loader, train_step, trainer

LOG = LogConfig(log_every=1, checkpoint_every=1, tensorboard=False, progress=False)
STRATEGIES = ("ce", "aver", "ebkd", "aekd", "ca-mkd-logits", "fitnet-mkd", "ca-mkd")


def gradients(strategy: str, world: World, precision: PrecisionConfig = EAGER) -> torch.Tensor:
    """Flat gradients and sums of one step on 37 images over all processes, without batch norm in training mode."""
    step = train_step(strategy, world=world, precision=precision, full_batch=19 - world.rank)
    step.strategy.eval()  # the maps r_k have batch norms
    whole = batch(37)
    part = torch.arange(37).tensor_split(world.size)[world.rank]
    step(whole._replace(images=whole.images[part], target=whole.target[part], index=part), 37, 0.0, 0)
    totals = step.sums.read(world).totals
    numbers = torch.tensor([totals.images, *totals.losses, totals.correct, *totals.weights, *totals.feature_weights])
    return torch.cat([p.grad.flatten() for p in step.trainable.parameters() if p.grad is not None] + [numbers.float()])


def student_step(world: World) -> TrainStep:
    return train_step("ca-mkd", student=SmallNet(batch_norm=True, dropout=0.2), world=world)


def run(out: Path, world: World) -> None:
    """Train to the end, from the last checkpoint if there is one."""
    job = trainer(out, student_step(world), optim=replace(OPTIM, batch_size=16), log=LOG, world=world)
    checkpoint = job.checkpoints.latest()
    if checkpoint is not None:
        job.resume(checkpoint)
    world.wait()
    journal = Journal(out, LOG, job.steps, job.position, "") if world.is_main else NullJournal()
    job.run(journal)
    journal.close()
    if world.is_main:
        (out / "model.safetensors").write_bytes(model_bytes(job.step.student, {}))


def seen(world: World, train: bool) -> list[list[int]]:
    """Indices of the images of each process in one epoch of 101 images."""
    mine = torch.cat([b.index for b in loader(images(101), 16, world, train=train)]).tolist()
    everybody: list[list[int]] = [[]] * world.size
    if world.size == 1:
        return [mine]
    dist.all_gather_object(everybody, mine)
    return everybody


def from_all(mine: object, world: World) -> list[object]:
    """The objects of all processes."""
    everybody: list[object] = [None] * world.size
    dist.all_gather_object(everybody, mine)
    return everybody


def dropped(world: World) -> list[torch.Tensor]:
    """What dropout keeps of one batch, the same in every process, in three steps."""
    step, masks = train_step("ce", student=SmallNet(dropout=0.5), world=world), []
    step.student.dropout.register_forward_hook(lambda module, inputs, output: masks.append(output != 0))
    for number in range(3):
        step(batch(16), 16 * world.size, 0.0, number)
    return masks


def buffers(world: World) -> torch.Tensor:
    """Buffers of a module that differed between the processes, after rank 0's were copied."""
    norm = torch.nn.BatchNorm1d(3)
    norm.running_mean.fill_(world.rank + 1.0)
    world.copy_buffers(norm)
    return norm.running_mean


class UnreadableError(Exception):
    """An error that pickle writes and cannot read, as its message is not its argument."""

    def __init__(self, name: str, number: int) -> None:
        super().__init__(f"{name} {number}")


def error_of_main(world: World, error: Exception) -> str:
    """What each process raises if the task of rank 0 does."""

    def task() -> None:
        assert world.is_main
        raise error

    try:
        world.on_main(task)
    except Exception as found:
        return f"{type(found).__name__}: {found}"
    return "nothing"


def check(out: Path, world: World) -> None:
    results: dict[str, object] = {"gradients": {name: gradients(name, world) for name in STRATEGIES}}
    for name, mine in (
        ("dropped", dropped(world)),
        ("on_main", world.on_main(lambda: f"of {world.rank}")),
        ("errors", [error_of_main(world, error) for error in (RunExistsError("taken"), UnreadableError("taken", 7))]),
        ("sum", world.sum(torch.tensor([1.0, world.rank]))),
        ("buffers", buffers(world)),
    ):
        results[name] = from_all(mine, world)
    results |= {"train": seen(world, True), "test": seen(world, False)}
    torch.compile = partial(torch.compile, backend="aot_eager")  # tests the graphs, not inductor
    results["compiled"] = gradients("ca-mkd", world, PrecisionConfig(compile="on"))
    if world.is_main:
        torch.save(results, out / "check.pt")


def kill_at(victim: int, step: int) -> None:
    """Send SIGKILL to process `victim` in the middle of its step `step`, counted from 0."""
    take = TrainStep.__call__

    def last(self: TrainStep, batch: Batch, items: int, rate: float, number: int, following: Batch | None) -> None:
        if self._world.rank == victim and number == step:
            os.kill(os.getpid(), signal.SIGKILL)
        take(self, batch, items, rate, number, following)

    TrainStep.__call__ = last


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    name, folder = sys.argv[1], Path(sys.argv[2])
    if len(sys.argv) > 3:
        kill_at(*map(int, sys.argv[3:]))
    for _ in range(8 if name == "check" else 0):  # as the runs of a comparison
        with processes("cpu") as this:
            this.wait()
    with processes("cpu") as this:
        assert this != ONE
        {"check": check, "run": run}[name](folder, this)
        if name == "check":
            (folder / "whole").mkdir(exist_ok=True)
            run(folder / "whole", this)
