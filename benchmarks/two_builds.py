"""`python -m benchmarks.two_builds OTHER`: the speed of this checkout against another one, such as the commit before.

Both must have the compiled module built in place (`python setup.py build_ext --inplace`). Each runs in a process of its
own; the two run alternating blocks of calls, so both see the same state of the machine, and the median of the ratios
counts. Where the system places a process's memory is worth up to 8 % for its whole life (the same build against itself,
256 x 32000), so several pairs of processes are started and the median of their medians counts. Covers the sizes of
`make bench` on a CPU, and training steps. With `make fingerprint` it shows that a refactoring changed nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parent.parent
BLOCK_SECONDS = 0.02  # of calls between two measurements of the same process


def subjects() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names and calls, one after another: the tensors of one exist only until the next is taken."""
    import torch

    import camkd_fast
    from benchmarks.shapes import COMPARED, features

    for shape in COMPARED["cpu"]:
        batch = shape.batch(torch.device("cpu"))

        def backward(batch: Any = batch) -> None:
            batch.student.grad = None
            camkd_fast.camkd_loss(*batch).loss.backward()

        yield f"{shape} swap-in", backward
        yield f"{shape} value + gradient", lambda batch=batch: camkd_fast.camkd_loss_and_grad(*batch)
    for size in features("cpu", "full"):
        generator = torch.Generator().manual_seed(0)
        student, teachers = [r.requires_grad_() for r in size.maps(generator)], size.maps(generator)
        logits = [torch.randn(size.N, size.C).requires_grad_() for _ in range(size.K)]
        target = torch.randint(size.C, (size.N,))

        def step(student=student, teachers=teachers, logits=logits, target=target) -> None:  # type: ignore[no-untyped-def]
            for leaf in (*student, *logits):
                leaf.grad = None
            weights, _ = camkd_fast.confidence_weights(logits, target)
            camkd_fast.weighted_feature_loss(student, teachers, weights).backward()

        yield f"{size} feature loss", step


def training_steps() -> Iterator[tuple[str, Callable[[], object]]]:
    """CA-MKD's training step with three teachers, eager: one that is mostly Python, one that is mostly convolutions."""
    import torch

    from camkd_fast import models
    from camkd_fast.data.batch import Batch
    from camkd_fast.train import strategies
    from camkd_fast.train.config import OptimConfig, PrecisionConfig
    from camkd_fast.train.distributed import World
    from camkd_fast.train.step import TrainStep
    from camkd_fast.train.teachers.live import LiveTeachers

    world = World(0, 1, torch.device("cpu"))
    for student, teacher, images, side in (("resnet8", "resnet8", 16, 8), ("vgg8", "resnet20", 64, 32)):
        teachers = LiveTeachers([models.freeze(models.create(teacher, 100)) for _ in range(3)], 100)
        model = models.create(student, 100)
        strategy = strategies.create("ca-mkd", teachers, model.num_features)  # type: ignore[arg-type]
        precision = PrecisionConfig(compile="off")
        step = TrainStep(model, strategy, teachers, OptimConfig(), precision, world, images, seed=0)
        index = torch.arange(images)
        batch = Batch(torch.randn(images, 3, side, side), torch.randint(100, (images,)), index, 0)
        name = f"{student}, {images} images of {side} x {side}, training step"
        yield name, lambda step=step, batch=batch, images=images: step(batch, images, 0.01, 0)


def work(package: Path, only: str) -> None:
    """The worker: for each subject prints its name, then answers every line with the seconds of one call.

    Args:
        only: part of the names of the subjects to run.
    """
    sys.path.insert(0, str(package))
    import torch

    import camkd_fast

    assert Path(camkd_fast.__file__).is_relative_to(package), camkd_fast.__file__
    torch.set_num_threads(os.cpu_count() or 1)
    for name, call in chain(subjects(), training_steps()):
        if only not in name:
            continue
        for _ in range(3):
            call()
        start = time.perf_counter()
        call()
        calls = max(1, round(BLOCK_SECONDS / (time.perf_counter() - start)))
        print(json.dumps(name), flush=True)
        while sys.stdin.readline().strip() == "run":
            start = time.perf_counter()
            for _ in range(calls):
                call()
            print((time.perf_counter() - start) / calls, flush=True)


def pipes(worker: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert worker.stdin is not None and worker.stdout is not None
    return worker.stdin, worker.stdout


def ask(worker: subprocess.Popen[str], command: str) -> str:
    into, out = pipes(worker)
    print(command, file=into, flush=True)
    return out.readline()


def compare(other: Path, rounds: int, only: str, other_first: bool = False) -> dict[str, list[float]]:
    """For each subject the other's time over ours, by round, in a new pair of processes."""
    command = [sys.executable, "-m", "benchmarks.two_builds", "--worker", "--only", only]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    packages = [ROOT, other.resolve()]
    started = {
        package: subprocess.Popen([*command, str(package)], env=environment, **options)
        for package in (packages[::-1] if other_first else packages)
    }
    workers = [started[package] for package in packages]
    ratios: dict[str, list[float]] = {}
    while name := {pipes(worker)[1].readline() for worker in workers}.pop():
        found = ratios.setdefault(json.loads(name), [])
        for round_ in range(rounds + 1):
            order = workers if round_ % 2 else workers[::-1]
            seconds = {worker: float(ask(worker, "run")) for worker in order}
            if round_:  # the first round warms up both
                found.append(seconds[workers[1]] / seconds[workers[0]])
        for worker in workers:
            print("next", file=pipes(worker)[0], flush=True)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("other", type=Path, help="root of the other checkout")
    parser.add_argument("--rounds", type=int, default=25, help="measurements of each pair of processes")
    parser.add_argument("--pairs", type=int, default=7, help="pairs of processes, one after another")
    parser.add_argument("--only", default="", metavar="WORDS", help="the subjects with these words in their names")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.other, arguments.only)
        return
    pairs = [
        compare(arguments.other, arguments.rounds, arguments.only, other_first=bool(pair % 2))
        for pair in range(arguments.pairs)
    ]
    if not pairs[0]:
        parser.error(f"no subject has the words {arguments.only!r} in its name")
    medians = {}
    for name in pairs[0]:
        found = [statistics.median(pair[name]) for pair in pairs]
        medians[name] = statistics.median(found)
        print(f"{medians[name]:.3f}  ({min(found):.2f} to {max(found):.2f})  {name}")
    mean = math.exp(statistics.mean(map(math.log, medians.values())))
    print(f"{mean:.3f}  geometric mean, the other's time over this one's; least {min(medians.values()):.3f}")


if __name__ == "__main__":
    main()
