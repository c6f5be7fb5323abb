"""The pieces of a study: train a teacher, cache a pool's outputs, train a cell. Each runs once and writes a record.

A piece locks its folder while it runs, so a second process with the same piece waits and then finds the record; the
lock of a killed process is released. A killed piece resumes from its last checkpoint.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...models.model_file import MODEL, model_bytes, read_model
from ...train import folder_lock, run
from ...train.atomic import write_atomically
from ...train.journal import METRICS, read_metrics
from ...train.run_folder import CHECKPOINTS, load_model
from . import cells, measure
from .cells import Cell
from .spec import StudyConfig, TeacherSpec

RECORD = "record.json"
PIECE_LOCK = ".piece.lock"  # not a run's own lock, which `run.teach` takes in the same folder
Origin = Mapping[str, str]  # "commit" and "where" (machine) of a result
Record = dict[str, Any]


def teach(study: StudyConfig, spec: TeacherSpec, out: Path, origin: Origin) -> Record:
    """Train or derive a teacher and measure it.

    Raises:
        As `run.teach`; FileNotFoundError: the source of a derived teacher is missing.
    """

    def work(folder: Path) -> Record:
        speed: Record = {}
        if spec.source:
            _derive(cells.teacher_folder(out, spec.source), folder, spec.logit_scale)
        else:
            result = run.teach(cells.teacher_config(study, spec, out), resume=True)
            speed = {"images_per_second": round(result.images_per_second, 1), "seconds": round(result.seconds, 1)}
        return {"name": spec.name, **measure.teacher(folder, study), **speed}

    folder, digest = cells.teacher_folder(out, spec.name), cells.teacher_hash(study, spec.name)
    return _once("teacher", folder, digest, origin, work)


def _derive(source: Path, folder: Path, scale: float) -> None:
    """Write a model with the logits of `source` times `scale`, replacing any earlier one."""
    _, metadata = read_model(source / MODEL)
    model = measure.scaled(load_model(source), scale)
    write_atomically(folder / MODEL, model_bytes(model, metadata))


def write_cache(study: StudyConfig, pool: str, out: Path, origin: Origin) -> Record:
    """Write the teacher cache of a pool, which all its cells replay, and measure the weights of its teachers.

    Raises:
        CacheError: the existing cache does not match; FileNotFoundError: a teacher is missing.
    """

    def work(folder: Path) -> Record:
        started = time.perf_counter()
        weights = measure.pool(cells.cache_config(study, study.pool(pool), out))
        return {"name": pool, **weights, "seconds": round(time.perf_counter() - started, 1)}

    return _once("pool", *_place_of_pool(study, pool, out), origin, work)


def _place_of_pool(study: StudyConfig, pool: str, out: Path) -> tuple[Path, str]:
    """Folder and hash of a pool's cache."""
    return cells.cache_folder(out, pool), cells.pool_hash(study, study.pool(pool))


def train(study: StudyConfig, cell: Cell, out: Path, origin: Origin) -> Record:
    """Train the student of a cell, or resume it.

    Raises:
        ValueError: the cache of its pool is missing.
        As `run.distill`.
    """

    def work(folder: Path) -> Record:
        variant = study.variant(cell.variant)
        teachers = study.pool(cell.pool).teachers if variant.has_pool else ()
        if variant.has_pool and _record(*_place_of_pool(study, cell.pool, out)) is None:
            raise ValueError(f"{cell} needs the cache of pool {cell.pool}, which could not be made")
        config = cells.student_config(study, cell, out, _best(out, teachers) if variant.best_teacher else 0)
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
    """The record in `folder` if its hash matches; otherwise run `work` and write its record."""
    with folder_lock.shared(folder, PIECE_LOCK):
        found = _record(folder, digest)
        if found is None:
            found = {"kind": kind, **work(folder), "hash": digest, **origin}
            write_atomically(folder / RECORD, (json.dumps(found) + "\n").encode())
        # Several times the model's size; only a piece without a record needs them
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        return found


def _record(folder: Path, digest: str) -> Record | None:
    """The record in `folder`, if it has this hash."""
    path = folder / RECORD
    found: Record | None = json.loads(path.read_bytes()) if path.exists() else None
    return found if found is not None and found["hash"] == digest else None
