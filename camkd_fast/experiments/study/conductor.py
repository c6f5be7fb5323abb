"""Runs all pieces of a study in worker processes: teachers, derived teachers, caches, cells.

Several machines, or ranks of torchrun, each take every w-th cell without communication. If they share `out`, they reuse
each other's teachers and caches; otherwise each computes its own, which are identical.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from ... import system
from ...train.strategies import STRATEGIES, Strategy, register
from . import cells, work
from .cells import Cell
from .spec import StudyConfig
from .work import Origin

Piece = tuple[str, Callable[..., work.Record], Any]  # name, function of `work`, its argument


class WorkerDiedError(RuntimeError):
    """A worker process was killed, for lack of memory for instance."""


def conduct(
    study: StudyConfig,
    out: Path,
    origin: Origin,
    *,
    jobs: int,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[str], None] = print,
    only: Sequence[Cell] | None = None,
) -> list[str]:
    """Run all unfinished pieces of this rank's part.

    Args:
        jobs: worker processes with one thread each; results do not depend on their number.
        progress: called with a line of text for every finished piece.
        only: cells to run instead of the rank's part.

    Returns:
        A line for each failed piece; failures do not stop the other pieces.
    """
    mine = cells.assigned(cells.cells(study), rank, world) if only is None else list(only)
    pools = cells.pools_of(study, mine)
    teachers = cells.teachers_of(study, pools)
    stages: list[list[Piece]] = [
        _from(rank, world, [(f"teacher {spec.name}", work.teach, spec) for spec in teachers if not spec.source]),
        [(f"teacher {spec.name}", work.teach, spec) for spec in teachers if spec.source],
        _from(rank, world, [(f"cache of {pool.name}", work.write_cache, pool.name) for pool in pools]),
        [(str(cell), work.train, cell) for cell in mine],
    ]
    failures: list[str] = []
    context = multiprocessing.get_context("spawn")  # a fork inherits OpenMP's state and hangs
    stop, end = context.Pipe(duplex=False)
    with stop, end, ProcessPoolExecutor(jobs, context, _begin, (tuple(STRATEGIES.values()), stop)) as workers:
        try:
            for stage in stages:
                failures += _stage(workers, stage, study, out, origin, progress)
        except BaseException:
            end.close()  # a signal ends this process only; its workers would finish their pieces first
            workers.shutdown(wait=False, cancel_futures=True)
            raise
    return failures


def _from(rank: int, world: int, pieces: list[Piece]) -> list[Piece]:
    """Rotated by rank, so that ranks that share a folder rarely wait for the same piece."""
    start = rank * len(pieces) // world
    return pieces[start:] + pieces[:start]


def _stage(
    workers: ProcessPoolExecutor,
    pieces: list[Piece],
    study: StudyConfig,
    out: Path,
    origin: Origin,
    progress: Callable[[str], None],
) -> list[str]:
    futures: dict[Future[work.Record], str] = {
        workers.submit(task, study, about, out, origin): name for name, task, about in pieces
    }
    failures = []
    for number, future in enumerate(as_completed(futures), 1):
        name = futures[future]
        try:
            record = future.result()
        except BrokenProcessPool as error:
            raise WorkerDiedError(f"a worker process was killed at or near {name}; finished pieces are kept") from error
        except Exception as error:  # any failure of one piece must not stop the others
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            failures.append(f"{name} failed: {reason}")
            progress(failures[-1])
            continue
        accuracy = f"  {100 * record['test_accuracy']:.2f} %" if "test_accuracy" in record else ""
        progress(f"{number}/{len(pieces)}  {name}{accuracy}")
    return failures


def _begin(kinds: Sequence[type[Strategy]], stop: Connection) -> None:
    """Initialise a worker.

    Args:
        kinds: strategies of the main process, some of them registered by other modules.
        stop: end of a pipe; the worker ends at once when the main process closes the other one.
    """
    for kind in kinds:
        register(kind)
    torch.set_num_threads(1)
    for name in ("RANK", "WORLD_SIZE"):  # LOCAL_RANK is kept: it selects the GPU
        os.environ.pop(name, None)  # a cell is a single-process run
    system.end_on_interrupt()  # no traceback per worker on Ctrl-C
    threading.Thread(target=_end_with_parent, args=(stop,), daemon=True).start()


def _end_with_parent(stop: Connection) -> None:
    """Exit with the main process, which cannot stop its workers if it is killed, or when it closes `stop`."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel, stop])
        os._exit(1)
