"""A study of the smallest size, and invented results of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from camkd_fast.experiments.study import cells
from camkd_fast.experiments.study.cells import Cell
from camkd_fast.experiments.study.records import Results
from camkd_fast.experiments.study.spec import Pool, Student, StudyConfig, TeacherSpec, Variant
from camkd_fast.train.config import DataConfig, OptimConfig

ORIGIN = {"commit": "0123456789", "where": "a processor"}


def study() -> StudyConfig:
    """Two good teachers, one with swapped classes, one over-confident; 60 images, one epoch."""
    return StudyConfig(
        title="A study",
        teachers=(
            TeacherSpec("good-0", "resnet8"),
            TeacherSpec("good-1", "resnet8", seed=1),
            TeacherSpec("swapped", "resnet8", seed=2, badness="classes 0 and 1 swapped", swapped=(0, 1)),
            TeacherSpec("loud", badness="logits x 4", source="good-1", logit_scale=4.0),
        ),
        pools=(Pool("good", ("good-0", "good-1")), Pool("bad", ("good-0", "swapped", "loud"))),
        students=(Student("resnet8"),),
        variants=(
            Variant("ce", "ce"),
            Variant("best", "kd", best_teacher=True),
            Variant("aver", "aver", label="AVER"),
            Variant("ca-mkd", "ca-mkd", label="CA-MKD"),
            Variant("uniform", "ca-mkd", table="ablation", uniform="logits", against="ca-mkd", pools=("bad",)),
            Variant("ca-mkd-official", "ca-mkd", table="official", official_scale=True, pools=("bad",)),
        ),
        seeds=(0, 1),
        data=DataConfig(images=60, views=2, view_seed=7, padding=1, loader="resident"),
        training=OptimConfig(epochs=1, batch_size=32),
        teaching=OptimConfig(epochs=1, batch_size=32),
    )


def invented(accuracy: Callable[[Cell], float], of: StudyConfig | None = None) -> Results:
    """Results in which every cell has the given accuracy, between 0 and 1."""
    of = replace(study(), seeds=(0, 1, 2)) if of is None else of
    results = Results(of)
    for spec in of.teachers:
        level = 0.5 if spec.badness else 0.9
        results.teachers[spec.name] = {
            "kind": "teacher",
            "name": spec.name,
            "parameters": 1000,
            "validation_accuracy": level,
            "test_accuracy": level,
            "test_loss": 1.0,
            "test_calibration": 0.05,
            "class_accuracy": [level] * 10,
            "hash": cells.teacher_hash(of, spec.name),
            **ORIGIN,
        }
    for pool in of.pools:
        K = len(pool.teachers)
        results.pools[pool.name] = {
            "kind": "pool",
            "name": pool.name,
            "confidence": [[1 / K] * 10] * K,
            "entropy": [[1 / K] * 10] * K,
            "confidence_spread": [0.1] * K,
            "hash": cells.pool_hash(of, pool),
            **ORIGIN,
        }
    for cell in cells.cells(of):
        K = len(of.pool(cell.pool).teachers) if of.variant(cell.variant).has_pool else 0
        features = of.variant(cell.variant).strategy == "ca-mkd"
        results.cells[cell] = {
            "kind": "cell",
            "pool": cell.pool,
            "student": cell.student,
            "variant": cell.variant,
            "seed": cell.seed,
            "test_accuracy": accuracy(cell),
            "test_calibration": 0.1,
            "validation_accuracy": [0.3, 0.4],
            "weights": [[1 / K] * K if K else []] * 2,
            "feature_weights": [[1 / K] * K if features else []] * 2,
            "class_feature_weights": [[1 / K] * 10] * K if features else None,
            "images_per_second": 1000.0,
            "seconds": 3.0,
            "hash": cells.cell_hash(of, cell),
            **ORIGIN,
        }
    return results
