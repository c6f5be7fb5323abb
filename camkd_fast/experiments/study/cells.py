"""The runs of a study: their names, settings, folders and hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...train import strategies
from ...train.config import DistillConfig, LogConfig, TeachConfig
from ...train.config_file import differences
from ...train.run_folder import is_free
from ...train.source_strings import SourceString
from .spec import Pool, Student, StudyConfig, TeacherSpec, Variant

QUIET = LogConfig(tensorboard=False, progress=False, checkpoint_minutes=1.0)
NO_POOL = "none"  # pool of runs without teachers


@dataclass(frozen=True, order=True)
class Cell:
    """The names of one run."""

    pool: str
    student: str
    variant: str
    seed: int

    def __str__(self) -> str:
        return f"{self.pool}/{self.student}/{self.variant}/seed-{self.seed}"


def cells(study: StudyConfig) -> list[Cell]:
    """All runs, seed by seed: a study that is stopped early has complete seeds."""
    places = list(comparisons(study))
    return list(dict.fromkeys(locate(*place, seed) for seed in study.seeds for place in places))


def comparisons(study: StudyConfig) -> Iterator[tuple[Pool, Student, Variant]]:
    """All combinations that the study includes, in its order."""
    for pool in study.pools:
        for student in study.students:
            for variant in study.variants:
                if (
                    (not variant.students or student.model in variant.students)
                    and (not variant.pools or pool.name in variant.pools)
                    and (not student.pools or pool.name in student.pools)
                ):
                    yield pool, student, variant


def locate(pool: Pool, student: Student, variant: Variant, seed: int) -> Cell:
    """The run of a combination. Variants without teachers have one run for all pools."""
    return Cell(pool.name if variant.has_pool else NO_POOL, student.model, variant.name, seed)


def assigned(cells: Sequence[Cell], rank: int, world: int) -> list[Cell]:
    """The cells of one of `world` machines or processes; the parts are disjoint and complete."""
    return list(cells[rank::world])


def pools_of(study: StudyConfig, cells: Sequence[Cell]) -> list[Pool]:
    """The pools of these cells, in the study's order."""
    used = {cell.pool for cell in cells}
    return [pool for pool in study.pools if pool.name in used]


def teachers_of(study: StudyConfig, pools: Sequence[Pool]) -> list[TeacherSpec]:
    """The teachers of these pools and the teachers that they are derived from, in the study's order."""
    used = {name for pool in pools for name in pool.teachers}
    used |= {study.teacher(name).source for name in used}
    return [teacher for teacher in study.teachers if teacher.name in used]


# --- folders ---------------------------------------------------------------------------------------------------------


def teacher_folder(out: Path, name: str) -> Path:
    return out / "teachers" / name


def cache_folder(out: Path, pool: str) -> Path:
    return out / "caches" / pool


def cell_folder(out: Path, cell: Cell) -> Path:
    return out / "cells" / str(cell)


# --- settings --------------------------------------------------------------------------------------------------------


def teacher_config(study: StudyConfig, spec: TeacherSpec, out: Path) -> TeachConfig:
    """Config of a trained teacher."""
    epochs = study.teaching.epochs if spec.epochs is None else spec.epochs
    return TeachConfig(
        model=spec.model,
        seed=spec.seed,
        out=teacher_folder(out, spec.name),
        wrong_labels=spec.wrong_labels,
        swapped=spec.swapped,
        data=replace(study.data, images=spec.images, views=None, view_seed=None),
        optim=replace(study.teaching, epochs=epochs),
        precision=study.teaching_precision,
        log=QUIET,
    )


def student_config(study: StudyConfig, cell: Cell, out: Path, best_teacher: int = 0) -> DistillConfig:
    """Config of a cell.

    Args:
        best_teacher: position of the pool's best teacher, used by variants with `best_teacher`.
    """
    student, variant = study.student(cell.student), study.variant(cell.variant)
    pool = study.pool(cell.pool) if variant.has_pool else None
    rate = study.training.learning_rate if student.learning_rate is None else student.learning_rate
    owns = variant.table == "main" and variant.beta is not None and student.beta is not None
    return DistillConfig(
        student=student.model,
        strategy=variant.strategy,
        alpha=variant.alpha,
        beta=student.beta if owns else variant.beta,
        temperature=variant.temperature,
        official_scale=variant.official_scale,
        teacher_index=best_teacher if variant.best_teacher else 0,
        detach=variant.detach,
        uniform=variant.uniform,
        seed=cell.seed,
        out=cell_folder(out, cell),
        optim=replace(study.training, learning_rate=rate),
        **_shared(study, pool, out),
    )


def cache_config(study: StudyConfig, pool: Pool, out: Path) -> DistillConfig:
    """Config of a run that needs the logits and features of the pool's teachers, for writing their cache."""
    everything = next(name for name, kind in strategies.STRATEGIES.items() if kind.needs_features)
    return DistillConfig(strategy=everything, optim=study.training, **_shared(study, pool, out))


def _shared(study: StudyConfig, pool: Pool | None, out: Path) -> dict[str, Any]:
    """Common settings of all runs from a pool."""
    return {
        "teachers": tuple(SourceString(teacher_folder(out, name)) for name in pool.teachers) if pool else (),
        "teacher_cache": cache_folder(out, pool.name) if pool else None,
        "cache_dtype": study.cache_dtype,
        "data": study.data,
        "precision": study.precision,
        "log": QUIET,
    }


# --- hashes ----------------------------------------------------------------------------------------------------------
# Hashes cover only settings that differ from the defaults, so a new setting in a later version changes no hash.


def cell_hash(study: StudyConfig, cell: Cell) -> str:
    """Hash of all settings that a cell's result depends on, including its teachers; independent of folders."""
    variant = study.variant(cell.variant)
    teachers = [teacher_hash(study, name) for name in study.pool(cell.pool).teachers] if variant.has_pool else []
    return _hash(_settings(student_config(study, cell, Path())), teachers, variant.best_teacher)


def teacher_hash(study: StudyConfig, name: str) -> str:
    """Hash of all settings that a teacher depends on."""
    spec = study.teacher(name)
    if spec.source:
        return _hash(teacher_hash(study, spec.source), spec.logit_scale)
    return _hash(_settings(teacher_config(study, spec, Path())))


def pool_hash(study: StudyConfig, pool: Pool) -> str:
    """Hash of all settings that a pool's outputs on the students' images depend on."""
    settings = _settings(cache_config(study, pool, Path()))
    relevant = {name: value for name, value in settings.items() if not name.startswith("optim.")}
    return _hash([teacher_hash(study, name) for name in pool.teachers], relevant)


def _settings(config: TeachConfig | DistillConfig) -> dict[str, Any]:
    changed = differences(config, type(config)())
    return {name: value for name, (value, _) in changed.items() if name != "teachers" and not is_free(name)}


def _hash(*content: Any) -> str:
    """Hash of the content, 12 hexadecimal digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
