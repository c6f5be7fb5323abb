"""Every setting of a study file reaches the config of the run that it is for, and what is measured is what is meant.

Nothing is trained here; test_study.py runs a study.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from camkd_fast import models
from camkd_fast.experiments.study import cells, check, measure, work
from camkd_fast.experiments.study.cells import Cell
from camkd_fast.experiments.study.spec import Pool, Student, StudyConfig, TeacherSpec, Variant
from camkd_fast.models.model_file import MODEL, model_bytes
from camkd_fast.train.config import DataConfig, DistillConfig, OptimConfig, PrecisionConfig
from tests.support.study_parts import invented, study

OUT = Path("out")


def config(of: StudyConfig, variant: str, pool: str = "bad", student: str = "resnet8", best: int = 0) -> DistillConfig:
    return cells.student_config(of, Cell(pool, student, variant, 1), OUT, best)


def with_variant(**changes: Any) -> StudyConfig:
    """The study with one more variant, of all that a variant may change."""
    of = study()
    return replace(of, variants=(*of.variants, Variant("other", "ca-mkd", **changes)))


# --- variants, students, teachers ------------------------------------------------------------------------------------

# Field of Variant -> another value; its DistillConfig has a field of the same name.
VARIANT = {
    "strategy": "fitnet-mkd",
    "alpha": 0.3,
    "beta": 7.5,
    "temperature": 2.5,
    "detach": False,
    "uniform": "logits",
    "official_scale": True,
}


def test_every_field_that_a_variant_shares_with_a_run_is_tested() -> None:
    shared = {f.name for f in fields(Variant)} & {f.name for f in fields(DistillConfig)}
    assert shared == set(VARIANT)


@pytest.mark.parametrize("name", VARIANT)
def test_a_variant_sets_its_run(name: str) -> None:
    value = VARIANT[name]
    of = study()
    variant = replace(Variant("other", "ca-mkd"), **{name: value})
    of = replace(of, variants=(*of.variants, variant))
    assert getattr(config(of, "other"), name) == value != getattr(config(of, "ca-mkd"), name)
    one, two = (cells.cell_hash(of, Cell("bad", "resnet8", v, 1)) for v in ("ca-mkd", "other"))
    assert one != two


def test_a_cell_sets_the_seed_the_folder_and_the_teachers() -> None:
    found = config(study(), "ca-mkd")
    assert found.seed == 1 and found.student == "resnet8" and found.out == OUT / "cells/bad/resnet8/ca-mkd/seed-1"
    assert found.teachers == tuple(f"{OUT}/teachers/{name}" for name in ("good-0", "swapped", "loud"))
    assert found.teacher_cache == OUT / "caches" / "bad"
    alone = config(study(), "ce", cells.NO_POOL)
    assert alone.teachers == () and alone.teacher_cache is None
    assert [config(study(), name, best=2).teacher_index for name in ("best", "ca-mkd")] == [2, 0]


def test_the_study_sets_data_training_precision_and_cache() -> None:
    data = DataConfig(images=80, views=3, view_seed=1, flip=True)
    training, precision = OptimConfig(epochs=5, momentum=0.5), PrecisionConfig(dtype="bfloat16")
    of = replace(study(), data=data, training=training, precision=precision, cache_dtype="bfloat16")
    for found in (config(of, "ca-mkd"), cells.cache_config(of, of.pools[0], OUT)):
        assert (found.data, found.optim, found.precision) == (data, training, precision)
        assert found.cache_dtype == "bfloat16"


def test_a_student_has_its_own_rate_and_beta_in_the_main_table() -> None:
    of = study()
    students = (*of.students, Student("vgg8", learning_rate=0.02, beta=3.0))
    variants = (
        *of.variants,
        Variant("main", "ca-mkd", beta=9.0),
        Variant("ablated", "ca-mkd", beta=9.0, table="ablation", against="ca-mkd"),
    )
    of = replace(of, students=students, variants=variants, training=replace(of.training, learning_rate=0.1))
    assert [config(of, "main", student=name).beta for name in ("resnet8", "vgg8")] == [9.0, 3.0]
    assert [config(of, "ablated", student=name).beta for name in ("resnet8", "vgg8")] == [9.0, 9.0]
    assert config(of, "aver", student="vgg8").beta is None
    assert [config(of, "main", student=name).optim.learning_rate for name in ("resnet8", "vgg8")] == [0.1, 0.02]


@pytest.mark.parametrize(
    ("name", "value"),
    [("model", "resnet14"), ("seed", 5), ("wrong_labels", 0.25), ("swapped", (2, 3)), ("epochs", 9), ("images", 30)],
)
def test_a_teacher_sets_its_run(name: str, value: Any) -> None:
    spec = replace(TeacherSpec("other", "resnet8"), **{name: value})
    of = replace(study(), teachers=(*study().teachers, spec), teaching_precision=PrecisionConfig(dtype="bfloat16"))

    def read(of: StudyConfig, spec: TeacherSpec) -> Any:
        found = cells.teacher_config(of, spec, OUT)
        assert found.out == OUT / "teachers" / spec.name and found.precision.dtype == "bfloat16"
        assert found.data.views is None and found.data.view_seed is None
        return {"epochs": found.optim.epochs, "images": found.data.images}.get(name, getattr(found, name, None))

    assert read(of, spec) == value != read(of, replace(spec, **{name: getattr(TeacherSpec("x", "resnet8"), name)}))
    before = replace(of, teachers=(*study().teachers, TeacherSpec("other", "resnet8")))
    assert cells.teacher_hash(of, "other") != cells.teacher_hash(before, "other")


def test_what_a_teacher_is_made_of_is_part_of_every_hash_above_it() -> None:
    of = study()
    other = replace(of, teachers=(of.teachers[0], replace(of.teachers[1], seed=9), *of.teachers[2:]))
    assert cells.teacher_hash(of, "loud") != cells.teacher_hash(other, "loud")  # derived from the changed one
    assert cells.pool_hash(of, of.pools[1]) != cells.pool_hash(other, other.pools[1])
    for cell in cells.cells(of):
        same = cells.cell_hash(of, cell) == cells.cell_hash(other, cell)
        assert same == (cell.pool == cells.NO_POOL), cell


# --- which runs ------------------------------------------------------------------------------------------------------


def test_variants_and_students_stay_in_their_pools() -> None:
    of = study()
    of = replace(
        of,
        students=(Student("resnet8", pools=("good",)), Student("vgg8")),
        variants=(
            Variant("aver", "aver"),
            Variant("x", "ebkd", pools=("bad",)),
            Variant("y", "kd", students=("vgg8",)),
        ),
    )
    found = [(pool.name, student.model, variant.name) for pool, student, variant in cells.comparisons(of)]
    assert found == [
        ("good", "resnet8", "aver"),
        *(("good", "vgg8", "aver"), ("good", "vgg8", "y")),
        *(("bad", "vgg8", "aver"), ("bad", "vgg8", "x"), ("bad", "vgg8", "y")),
    ]


def test_machines_share_the_cells() -> None:
    every = cells.cells(study())
    for world in (1, 2, 3):
        parts = [cells.assigned(every, rank, world) for rank in range(world)]
        assert sorted(cell for part in parts for cell in part) == sorted(every)


def test_the_source_of_a_derived_teacher_is_trained_too() -> None:
    of = replace(study(), pools=(Pool("bad", ("loud",)),))
    assert [spec.name for spec in cells.teachers_of(of, of.pools)] == ["good-1", "loud"]


# --- measurements ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("validation", "best"), [((0.5, 0.9, 0.9), 1), ((0.9, 0.5, 0.7), 0), ((0.1, 0.2, 0.3), 2)])
def test_the_best_teacher_is_not_chosen_by_its_test_images(
    validation: tuple[float, ...], best: int, tmp_path: Path
) -> None:
    names = ("a", "b", "c")
    for name, accuracy in zip(names, validation, strict=True):
        folder = cells.teacher_folder(tmp_path, name)
        folder.mkdir(parents=True)
        record = {"validation_accuracy": accuracy, "test_accuracy": 1 - accuracy}
        (folder / work.RECORD).write_text(json.dumps(record))
    assert work._best(tmp_path, names) == best


def test_a_teacher_is_measured_on_both_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    of = study()
    parts = measure.load_splits(of.data)
    metadata = {"model": "resnet8", "num_classes": 10, "in_channels": 1, "mean": [0.0], "std": [1.0]}
    (tmp_path / MODEL).write_bytes(model_bytes(models.create("resnet8", 10, 1), metadata))

    def evaluate(model: Any, images: Any, *_: Any) -> Any:
        return SimpleNamespace(accuracy=float(len(images)), loss=2.0, calibration=3.0)

    monkeypatch.setattr(measure, "_evaluate", evaluate)
    found = measure.teacher(tmp_path, of)
    assert found["validation_accuracy"] == len(parts.validation) != len(parts.test) == found["test_accuracy"]
    assert found["test_loss"] == 2.0 and found["test_calibration"] == 3.0 and len(found["class_accuracy"]) == 10


def test_a_scaled_model_scales_its_logits() -> None:
    model = models.create("resnet8", 10, 1).eval()
    torch.nn.init.normal_(model.fc.bias)
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        before = model(images)
        torch.testing.assert_close(measure.scaled(model, 4.0)(images), 4 * before)


def test_means_by_class_are_over_the_images_of_the_class() -> None:
    weights, labels = torch.rand(2, 40), torch.arange(40) % 3 * 2  # classes 0, 2 and 4 of 6
    labels[:11] = 2
    found = torch.tensor(measure._by_class(weights, labels, 6))
    for c in range(6):
        expected = weights[:, labels == c].mean(1) if (labels == c).any() else torch.zeros(2)
        torch.testing.assert_close(found[:, c], expected, rtol=1e-4, atol=0)


def test_the_weights_of_a_pool_sum_to_one_over_its_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = [torch.randn(60, 10) * scale for scale in (1.0, 3.0, 5.0)]
    images = SimpleNamespace(labels=torch.arange(60) % 10, num_classes=10, __len__=lambda: 60)
    outputs = [SimpleNamespace(logits=z) for z in logits]
    teachers = SimpleNamespace(cache=SimpleNamespace(outputs=lambda view, index: outputs))

    class Images(SimpleNamespace):
        def __len__(self) -> int:
            return 60

    @contextmanager
    def cached(config: Any) -> Any:
        yield Images(labels=images.labels, num_classes=10), teachers, None

    monkeypatch.setattr(measure, "_cached_teachers", cached)
    found = measure.pool(DistillConfig())
    for rule in ("confidence", "entropy"):
        torch.testing.assert_close(torch.tensor(found[rule]).sum(0), torch.ones(10), rtol=1e-4, atol=0)
    assert found["confidence"] != found["entropy"] and len(found["confidence_spread"]) == 3


# --- the check -------------------------------------------------------------------------------------------------------


def test_the_check_accepts_no_difference_at_all() -> None:
    cell = Cell("good", "resnet8", "aver", 0)
    assert check.Checked(cell, 0.5, 0.5).agrees
    for again in (None, 0.5 + 1e-9, 0.499):
        assert not check.Checked(cell, 0.5, again).agrees


def test_checked_cells_depend_on_the_seed() -> None:
    results = invented(lambda cell: 0.5)
    chosen = [tuple(check.choose(results, 3, seed)) for seed in range(8)]
    assert len(set(chosen)) > 1 and check.choose(results, 3, 5) == check.choose(results, 3, 5)
    assert len(check.choose(results, 10**6, 0)) == len(results.cells)
