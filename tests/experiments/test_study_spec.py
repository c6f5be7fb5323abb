"""A study before it runs: its file, its runs and their hashes, and derived teachers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from camkd_fast import models
from camkd_fast.experiments.study import cells, measure, spec
from camkd_fast.experiments.study.cells import Cell
from camkd_fast.experiments.study.spec import Pool, TeacherSpec, Variant
from camkd_fast.train.config import PrecisionConfig
from camkd_fast.train.config_file import differences, serializable
from tests.support.study_parts import study

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "benchmarks" / "study"

pytestmark = pytest.mark.usefixtures("one_thread")


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["study", "quick", "beta", "cifar_size"])
def test_the_committed_studies_are_read(name: str) -> None:
    read = spec.load(STUDIES / f"{name}.yaml")
    every = cells.cells(read)
    assert len({cells.cell_hash(read, cell) for cell in every}) == len(set(every)) == len(every)


def test_the_study_covers_what_it_is_to_compare() -> None:
    full = spec.load(STUDIES / "study.yaml")
    assert len(full.seeds) >= 5 and full.data.data == "fashion-mnist"
    main = [variant for variant in full.variants if variant.table == "main"]
    wanted = {"ce", "kd", "aver", "ebkd", "aekd", "fitnet-mkd", "ca-mkd-logits", "ca-mkd"}
    assert {variant.strategy for variant in main} == wanted
    # Equal strength: only the strategy differs in the main table.
    for attribute in ("alpha", "temperature", "official_scale", "detach", "uniform"):
        assert len({getattr(variant, attribute) for variant in main}) == 1, attribute
    assert len({v.beta for v in main if v.strategy in ("fitnet-mkd", "ca-mkd")}) == 1
    assert {len(full.bad(pool)) for pool in full.pools} == {0, 1, 2} and {len(p.teachers) for p in full.pools} >= {3, 5}
    assert {v.temperature for v in full.variants if v.strategy == "aver"} == {1.0, 2.0, 4.0, 8.0}


def test_a_study_survives_yaml(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(serializable(study())))
    assert spec.load(path) == study()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TeacherSpec("t"), "teacher t needs a model or a source, and not both"),
        (lambda: TeacherSpec("t", "vgg8", source="u"), "needs a model or a source, and not both"),
        (lambda: TeacherSpec("t", "vgg8", logit_scale=2.0), "is trained: logit_scale 2.0 is for one with a source"),
        (lambda: TeacherSpec("t", source="u", logit_scale=0.0), "logit_scale 0.0, which must be positive"),
        (lambda: TeacherSpec("../t", "vgg8"), "got '../t'"),
        (lambda: Pool("p", ()), "pool p has no teachers"),
        (lambda: Variant("v", "avr"), "no strategy is named 'avr'"),
        (lambda: Variant("v", "aver", best_teacher=True), "variant v is aver: best_teacher is for kd"),
        (lambda: replace(study(), seeds=()), "at least one seed"),
        (lambda: replace(study(), seeds=(1, 1)), "seed 1 is named twice"),
        (lambda: replace(study(), pools=(Pool("p", ("good-7",)),)), "teachers of pool p: 'good-7' is none of good-0"),
        (lambda: replace(study(), variants=(Variant("v", "ce"),)), "against of variant v: 'aver' is none of v"),
        (lambda: replace(study(), data=replace(study().data, views=None)), "views must be a number"),
        (lambda: replace(study(), data=replace(study().data, view_seed=None)), "view_seed must be a number"),
    ],
)
def test_invalid_studies_are_refused(make: object, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        make()  # type: ignore[operator]
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["a/b", "a/../b", "a b", "a_b", "A", ".a", "", "a\n", "a\\b", "ä"])
def test_names_are_names_of_folders(name: str) -> None:
    for make in (lambda: TeacherSpec(name, "vgg8"), lambda: Pool(name, ("t",)), lambda: Variant(name, "ce")):
        with pytest.raises(ValueError, match=r"names are made of a-z, 0-9, \. and -, got "):
            make()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- 1", "must hold a mapping, got [1]"),
        ("{", "is not YAML"),
        ("title: x", "missing 5 required positional arguments"),
        ("titel: x", "unknown field titel; did you mean title?"),
    ],
)
def test_invalid_files_are_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        spec.load(path)
    assert words in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


# --- its runs --------------------------------------------------------------------------------------------------------


def test_cells_go_seed_by_seed_and_runs_without_teachers_occur_once() -> None:
    every = cells.cells(study())
    names = [(c.pool, c.variant) for c in every if c.seed == 0]
    assert names == [
        *(("none", "ce"), ("good", "best"), ("good", "aver"), ("good", "ca-mkd"), ("bad", "best"), ("bad", "aver")),
        *(("bad", "ca-mkd"), ("bad", "uniform"), ("bad", "ca-mkd-official")),
    ]
    assert [replace(cell, seed=0) for cell in every[9:]] == every[:9] and {cell.seed for cell in every[9:]} == {1}


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_ranks_share_all_cells_and_no_cell_twice(world: int) -> None:
    every = cells.cells(study())
    parts = [cells.assigned(every, rank, world) for rank in range(world)]
    assert sorted(cell for part in parts for cell in part) == sorted(every)


def test_runs_differ_in_what_their_variant_says_and_in_nothing_else(tmp_path: Path) -> None:
    full = study()
    for pool in full.pools:
        aver = cells.student_config(full, Cell(pool.name, "resnet8", "aver", 1), tmp_path)
        for variant in full.variants:
            if variant.has_pool:
                config = cells.student_config(full, Cell(pool.name, "resnet8", variant.name, 1), tmp_path)
                said = {"strategy", "out", "beta", "official_scale", "uniform"}
                assert set(differences(aver, config)) <= said
    # The cache belongs to the pool, whatever the variant and the seed.
    runs = [cells.student_config(full, cell, tmp_path) for cell in cells.cells(full) if cell.pool == "bad"]
    assert {config.teacher_cache for config in runs} == {tmp_path / "caches" / "bad"}
    assert {config.data.view_seed for config in runs} == {7} and {config.seed for config in runs} == {0, 1}


def test_a_students_learning_rate_is_its_own_or_everybodys() -> None:
    full = replace(study(), training=replace(study().training, learning_rate=0.3))
    other = replace(full, students=(replace(full.students[0], learning_rate=0.2),))
    for settings, rate in ((full, 0.3), (other, 0.2)):
        assert cells.student_config(settings, Cell("none", "resnet8", "ce", 0), Path()).optim.learning_rate == rate


def test_a_students_beta_takes_the_place_of_a_main_variants_that_has_one() -> None:
    hints = Variant("hints", "fitnet-mkd", beta=50.0)
    settings = replace(study(), variants=(*study().variants, hints, replace(hints, name="more", table="ablation")))
    student, pool = settings.students[0], settings.pools[0].name

    def beta(own: float | None, variant: str) -> float | None:
        changed = replace(settings, students=(replace(student, beta=own),))
        return cells.student_config(changed, Cell(pool, student.model, variant, 0), Path()).beta

    assert [beta(None, name) for name in ("hints", "more", "aver")] == [50.0, 50.0, None]
    assert [beta(5.0, name) for name in ("hints", "more", "aver")] == [5.0, 50.0, None]


def test_teachers_learn_in_their_own_precision_and_are_asked_in_the_students() -> None:
    full = replace(study(), teaching_precision=PrecisionConfig(dtype="bfloat16"))
    assert cells.teacher_config(full, full.teachers[0], Path()).precision.dtype == "bfloat16"
    assert cells.cache_config(full, full.pools[0], Path()).precision.dtype == "float32"
    assert cells.student_config(full, Cell("none", "resnet8", "ce", 0), Path()).precision.dtype == "float32"


def test_a_hash_is_of_everything_that_matters_and_of_nothing_else() -> None:
    full = study()
    cell = Cell("bad", "resnet8", "aver", 0)
    same = cells.cell_hash(full, cell)
    assert same == cells.cell_hash(replace(full, title="Another", seeds=(0,), data=replace(full.data, workers=9)), cell)
    loud = replace(full.teachers[3], logit_scale=5.0)
    others = [
        replace(full, teachers=(*full.teachers[:3], loud)),
        replace(full, teachers=(replace(full.teachers[0], epochs=2), *full.teachers[1:])),
        replace(full, teaching=replace(full.teaching, weight_decay=0.0)),
        replace(full, training=replace(full.training, epochs=2)),
        replace(full, data=replace(full.data, views=3)),
        replace(full, precision=replace(full.precision, dtype="bfloat16")),
        replace(full, pools=(full.pools[0], Pool("bad", ("good-0", "swapped")))),
    ]
    hashes = [cells.cell_hash(other, cell) for other in others]
    assert len({same, *hashes, cells.cell_hash(full, replace(cell, seed=1))}) == len(others) + 2
    # Teachers do not depend on the students' settings.
    assert cells.teacher_hash(others[3], "loud") == cells.teacher_hash(full, "loud")
    assert cells.teacher_hash(others[0], "loud") != cells.teacher_hash(full, "loud")


# --- measurements ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["resnet20", "wrn-16-2", "vgg8", "vgg13", "mobilenetv2", "shufflenetv1", "shufflenetv2"]
)
def test_a_scaled_model_multiplies_its_logits(name: str) -> None:
    torch.manual_seed(0)
    model = models.create(name, 10, 1).eval()
    images = torch.randn(2, 1, 28, 28)
    with torch.no_grad():
        before = model(images)
        torch.testing.assert_close(measure.scaled(model, 4.0)(images), 4 * before)


def test_what_has_no_classifier_cannot_be_scaled() -> None:
    model = torch.nn.Conv2d(1, 1, 1)
    model.num_classes = 10
    with pytest.raises(ValueError, match="Conv2d does not end with a linear layer"):
        measure.scaled(model, 2.0)
