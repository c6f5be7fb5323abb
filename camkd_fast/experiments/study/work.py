"""The pieces of a study: train a teacher, ask a pool's teachers, train a cell. Each is done once and leaves a record.

A piece holds the lock of its folder while it works, so a second process that wants the same waits and then finds it
done; the lock of a killed one is free. A piece that was killed goes on from its last checkpoint.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...train import run
from ...train.atomic import write_atomically
from ...train.checkpoint import model_bytes, read_model
from ...train.journal import METRICS, read_metrics
from ...train.run_folder import CHECKPOINTS, MODEL, load_model
from . import cells, measure
from .cells import Cell
from .spec import StudyConfig, TeacherSpec

RECORD = "record.json"
Origin = Mapping[str, str]  # "commit" and "where" a result comes from
Record = dict[str, Any]


def teach(study: StudyConfig, spec: TeacherSpec, out: Path, origin: Origin) -> Record:
    """Train or derive a teacher and measure it.

    Raises:
        As `run.teach`; FileNotFoundError: the teacher that it is derived from is not there.
    """

    def work(folder: Path) -> Record:
        speed: Record = {}
        if spec.source:
            _derive(cells.teacher_folder(out, spec.source), folder, spec.logit_scale)
        else:
            result = run.teach(cells.teaching(study, spec, out), resume=True)
            speed = {"images_per_second": round(result.images_per_second, 1), "seconds": round(result.seconds, 1)}
        return {"name": spec.name, **measure.teacher(folder, study), **speed}

    folder, digest = cells.teacher_folder(out, spec.name), cells.teacher_hash(study, spec.name)
    return _once("teacher", folder, digest, origin, work)


def _derive(source: Path, folder: Path, scale: float) -> None:
    """A model whose logits are those of `source` times `scale`; made anew each time, as nothing says of what it is."""
    _, metadata = read_model(source / MODEL)
    model = measure.scaled(load_model(source), scale)
    write_atomically(folder / MODEL, model_bytes(model, metadata))


def ask(study: StudyConfig, pool: str, out: Path, origin: Origin) -> Record:
    """Make the teacher cache of a pool, which all its cells replay, and say how its teachers are weighed.

    Raises:
        CacheError: the cache that is there is of something else; FileNotFoundError: a teacher is not there.
    """

    def work(folder: Path) -> Record:
        started = time.perf_counter()
        weights = measure.pool(cells.asking(study, study.pool(pool), out))
        return {"name": pool, **weights, "seconds": round(time.perf_counter() - started, 1)}

    folder, digest = cells.cache_folder(out, pool), cells.pool_hash(study, study.pool(pool))
    return _once("pool", folder, digest, origin, work)


def train(study: StudyConfig, cell: Cell, out: Path, origin: Origin) -> Record:
    """Train the student of a cell, or go on with it.

    Raises:
        ValueError: its pool's teachers were not asked yet.
        As `run.distill`.
    """

    def work(folder: Path) -> Record:
        variant = study.variant(cell.variant)
        teachers = study.pool(cell.pool).teachers if variant.has_pool else ()
        if variant.has_pool and not (cells.cache_folder(out, cell.pool) / RECORD).exists():
            raise ValueError(f"{cell} needs the cache of pool {cell.pool}, which could not be made")
        config = cells.distilling(study, cell, out, _best(out, teachers) if variant.best_teacher else 0)
        result = run.distill(config, resume=True)
        epochs = read_metrics(folder / METRICS, "epoch")
        record = {
            "pool": cell.pool,
            "student": cell.student,
            "variant": cell.variant,
            "seed": cell.seed,
            "test_images": result.test.images,
            "test_accuracy": result.test.accuracy,
            "test_loss": result.test.loss,
            "test_calibration": result.test.calibration,
            "validation_accuracy": [epoch["validation_accuracy"] for epoch in epochs],
            "weights": [_rounded(epoch["weights"]) for epoch in epochs],
            "feature_weights": [_rounded(epoch["feature_weights"]) for epoch in epochs],
            "images_per_second": round(result.images_per_second, 1),
            "seconds": round(result.seconds, 1),
        }
        if epochs[-1]["feature_weights"] and any(map(study.is_bad, teachers)):
            record["class_feature_weights"] = measure.class_feature_weights(config)
        shutil.rmtree(folder / CHECKPOINTS)  # several times the model's size, and of no use to a finished cell
        return record

    return _once("cell", cells.cell_folder(out, cell), cells.cell_hash(study, cell), origin, work)


def _best(out: Path, teachers: tuple[str, ...]) -> int:
    """Position of the teacher with the highest validation accuracy, the first of equals."""
    records = [json.loads((cells.teacher_folder(out, name) / RECORD).read_bytes()) for name in teachers]
    accuracies = [record["validation_accuracy"] for record in records]
    return accuracies.index(max(accuracies))


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 5) for value in values]


def _once(kind: str, folder: Path, digest: str, origin: Origin, work: Callable[[Path], Record]) -> Record:
    """The record in `folder` if it is of these settings; otherwise what `work` makes."""
    with locked(folder):
        path = folder / RECORD
        if path.exists():
            found: Record = json.loads(path.read_bytes())
            if found["hash"] == digest:
                return found
        record = {"kind": kind, **work(folder), "hash": digest, **origin}
        write_atomically(path, (json.dumps(record) + "\n").encode())
        return record


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else works in this folder meanwhile: the system frees the lock of a process that ends in any way."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
