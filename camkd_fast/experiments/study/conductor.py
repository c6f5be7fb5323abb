"""All pieces of a study in worker processes: teachers, then what is derived from them, then caches, then cells.

Several machines, or ranks of torchrun, each take every w-th cell and need not talk: where they share `out` they find
each other's teachers and caches, elsewhere each makes its own, which are the same.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from ...train.strategies import STRATEGIES, Strategy, register
from . import cells, work
from .cells import Cell
from .spec import StudyConfig
from .work import Origin

Piece = tuple[str, Callable[..., work.Record], Any]  # its name, the function of `work`, what it is about


def conduct(
    study: StudyConfig,
    out: Path,
    origin: Origin,
    *,
    jobs: int,
    rank: int = 0,
    world: int = 1,
    say: Callable[[str], None] = print,
    only: Sequence[Cell] | None = None,
) -> list[str]:
    """Do all that is not done yet of this rank's share.

    Args:
        jobs: worker processes, of one thread each: a cell's result does not depend on their number.
        say: told of every piece that is done.
        only: these cells instead of the rank's share.

    Returns:
        A line for each piece that failed; the others went on.
    """
    mine = cells.assigned(cells.cells(study), rank, world) if only is None else list(only)
    pools = cells.pools_of(study, mine)
    teachers = cells.teachers_of(study, pools)
    stages: list[list[Piece]] = [
        _from(rank, world, [(f"teacher {spec.name}", work.teach, spec) for spec in teachers if not spec.source]),
        [(f"teacher {spec.name}", work.teach, spec) for spec in teachers if spec.source],
        _from(rank, world, [(f"cache of {pool.name}", work.ask, pool.name) for pool in pools]),
        [(str(cell), work.train, cell) for cell in mine],
    ]
    failures: list[str] = []
    context = multiprocessing.get_context("spawn")  # a fork would inherit OpenMP's threads, and hang
    with ProcessPoolExecutor(jobs, context, _begin, (tuple(STRATEGIES.values()),)) as workers:
        try:
            for stage in stages:
                failures += _stage(workers, stage, study, out, origin, say)
        except BaseException:
            workers.shutdown(wait=False, cancel_futures=True)
            raise
    return failures


def _from(rank: int, world: int, pieces: list[Piece]) -> list[Piece]:
    """Begun at another place by each rank, so that ranks that share a folder seldom wait for each other."""
    start = rank * len(pieces) // world
    return pieces[start:] + pieces[:start]


def _stage(
    workers: ProcessPoolExecutor,
    pieces: list[Piece],
    study: StudyConfig,
    out: Path,
    origin: Origin,
    say: Callable[[str], None],
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
            raise RuntimeError(f"a worker process was killed at or near {name}; what is finished is kept") from error
        except Exception as error:  # one bad cell must not cost the others, whatever it is that failed
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            failures.append(f"{name} failed: {reason}")
            say(failures[-1])
            continue
        accuracy = f"  {100 * record['test_accuracy']:.2f} %" if "test_accuracy" in record else ""
        say(f"{number}/{len(pieces)}  {name}{accuracy}")
    return failures


def _begin(kinds: Sequence[type[Strategy]]) -> None:
    """Initialise a worker; `kinds` are the strategies of the main process, some of them registered by other modules."""
    for kind in kinds:
        register(kind)
    torch.set_num_threads(1)
    for name in ("RANK", "WORLD_SIZE"):  # LOCAL_RANK stays, it says which GPU is this rank's
        os.environ.pop(name, None)  # a cell is one process's: it must not look for torchrun's others
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends workers without a traceback each
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed conductor leaves nobody who would stop its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
