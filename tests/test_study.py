"""The study: what a file says, which runs follow, that each is done once and in full, and that a check finds faults."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from camkd_fast import cli, models
from camkd_fast.train import run
from camkd_fast.train.config import PrecisionConfig, differences, plain
from camkd_fast.train.journal import read_metrics
from camkd_fast.train.study import cells, check, conductor, measure, results, spec, work
from camkd_fast.train.study.cells import Cell
from camkd_fast.train.study.spec import Pool, TeacherSpec, Variant
from tests.study_parts import ORIGIN, invented, study

ROOT = Path(__file__).parent.parent
STUDIES = ROOT / "benchmarks" / "study"

pytestmark = pytest.mark.usefixtures("one_thread")


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["study", "quick"])
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
    # Equal strength: nothing but the strategy differs in the main table.
    for attribute in ("alpha", "temperature", "official_scale", "detach", "uniform"):
        assert len({getattr(variant, attribute) for variant in main}) == 1, attribute
    assert len({v.beta for v in main if v.strategy in ("fitnet-mkd", "ca-mkd")}) == 1
    assert {len(full.bad(pool)) for pool in full.pools} == {0, 1, 2} and {len(p.teachers) for p in full.pools} >= {3, 5}
    assert {v.temperature for v in full.variants if v.strategy == "aver"} == {1.0, 2.0, 4.0, 8.0}


def test_a_study_survives_yaml(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(plain(study())))
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
def test_unfit_studies_are_refused(make: object, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        make()  # type: ignore[operator]
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- 1", "must hold a mapping, got [1]"),
        ("{", "is not YAML"),
        ("title: x", "missing 5 required positional arguments"),
        ("titel: x", "unknown field titel; did you mean title?"),
    ],
)
def test_unfit_files_are_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        spec.load(path)
    assert words in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


# --- its runs --------------------------------------------------------------------------------------------------------


def test_cells_are_everything_of_a_seed_before_the_next_and_labels_alone_are_run_once() -> None:
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
    parts = [cells.share(every, rank, world) for rank in range(world)]
    assert sorted(cell for part in parts for cell in part) == sorted(every)


def test_runs_differ_in_what_their_variant_says_and_in_nothing_else(tmp_path: Path) -> None:
    full = study()
    for pool in full.pools:
        aver = cells.distilling(full, Cell(pool.name, "resnet8", "aver", 1), tmp_path)
        for variant in full.variants:
            if variant.has_pool:
                config = cells.distilling(full, Cell(pool.name, "resnet8", variant.name, 1), tmp_path)
                said = {"strategy", "out", "beta", "official_scale", "uniform"}
                assert set(differences(aver, config)) <= said
    # The cache is the pool's, whatever the variant and the seed.
    runs = [cells.distilling(full, cell, tmp_path) for cell in cells.cells(full) if cell.pool == "bad"]
    assert {config.teacher_cache for config in runs} == {tmp_path / "caches" / "bad"}
    assert {config.data.view_seed for config in runs} == {7} and {config.seed for config in runs} == {0, 1}


def test_a_students_learning_rate_is_its_own_or_everybodys() -> None:
    full = replace(study(), training=replace(study().training, learning_rate=0.3))
    other = replace(full, students=(replace(full.students[0], learning_rate=0.2),))
    for settings, rate in ((full, 0.3), (other, 0.2)):
        assert cells.distilling(settings, Cell("none", "resnet8", "ce", 0), Path()).optim.learning_rate == rate


def test_teachers_learn_in_their_own_precision_and_are_asked_in_the_students() -> None:
    full = replace(study(), teaching_precision=PrecisionConfig(dtype="bfloat16"))
    assert cells.teaching(full, full.teachers[0], Path()).precision.dtype == "bfloat16"
    assert cells.asking(full, full.pools[0], Path()).precision.dtype == "float32"
    assert cells.distilling(full, Cell("none", "resnet8", "ce", 0), Path()).precision.dtype == "float32"


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
    # Teachers that are trained alike are the same whatever the students do.
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


# --- from end to end -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study whose seed 0 was run by two workers."""
    out = tmp_path_factory.mktemp("study")
    failures = conductor.conduct(replace(study(), seeds=(0,)), out, ORIGIN, jobs=2, say=lambda text: None)
    assert failures == []
    return out


def test_every_cell_leaves_its_record(done: Path) -> None:
    found = results.collect(study(), done)
    assert len(found.cells) == 9 and {cell.seed for cell in found.missing} == {1} and len(found.teachers) == 4
    for cell, record in found.cells.items():
        assert results.cell_of(record) == cell and record["commit"] == ORIGIN["commit"] and len(record["hash"]) == 12
        assert 0.0 <= record["test_accuracy"] <= 1.0 and 0.0 <= record["test_calibration"] <= 1.0
        assert record["test_images"] == 597 and len(record["validation_accuracy"]) == 1
        assert not (cells.cell_folder(done, cell) / "checkpoints").exists()
    camkd = found.cells[Cell("bad", "resnet8", "ca-mkd", 0)]
    assert sum(camkd["weights"][0]) == pytest.approx(1.0, abs=1e-4)
    by_class = torch.tensor(camkd["class_feature_weights"])
    assert by_class.shape == (3, 10)
    torch.testing.assert_close(by_class.sum(0), torch.ones(10), atol=1e-4, rtol=0)
    assert "class_feature_weights" not in found.cells[Cell("good", "resnet8", "ca-mkd", 0)]


def test_the_pools_weights_are_those_of_its_runs(done: Path) -> None:
    found = results.collect(study(), done)
    # One epoch shows view 0, about which the pool's record speaks: the mean over classes, weighted by their sizes.
    labels = run.training_set(*_training(done))[0].labels
    share = torch.bincount(labels, minlength=10) / len(labels)
    for pool in ("good", "bad"):
        expected = (torch.tensor(found.pools[pool]["confidence"]) * share).sum(1)
        told = torch.tensor(found.cells[Cell(pool, "resnet8", "ca-mkd", 0)]["weights"][-1])
        torch.testing.assert_close(told, expected, atol=1e-4, rtol=0)


def _training(out: Path) -> tuple[object, object, object]:
    from camkd_fast.train.distributed import World

    config = cells.distilling(study(), Cell("bad", "resnet8", "ca-mkd", 0), out)
    return config, run.load_splits(config.data).train, World(0, 1, torch.device("cpu"))


def test_the_best_teacher_is_the_best_on_validation_images(done: Path) -> None:
    found = results.collect(study(), done)
    for pool in study().pools:
        accuracies = [found.teachers[name]["validation_accuracy"] for name in pool.teachers]
        weights = found.cells[Cell(pool.name, "resnet8", "best", 0)]["weights"][0]
        assert weights.index(1.0) == accuracies.index(max(accuracies))


def test_an_over_confident_teacher_is_as_right_as_its_source(done: Path) -> None:
    found = results.collect(study(), done).teachers
    assert found["loud"]["test_accuracy"] == found["good-1"]["test_accuracy"]
    assert found["loud"]["test_loss"] != found["good-1"]["test_loss"]


def test_a_derived_teacher_follows_its_source_and_scale(done: Path, tmp_path: Path) -> None:
    shutil.copytree(done / "teachers", tmp_path / "teachers")
    loud = study().teachers[3]
    kept = work.teach(study(), loud, tmp_path, ORIGIN)
    louder = replace(loud, logit_scale=8.0)
    other = replace(study(), teachers=(*study().teachers[:3], louder))
    assert work.teach(other, louder, tmp_path, ORIGIN)["test_loss"] > kept["test_loss"]
    assert work.teach(study(), loud, tmp_path, ORIGIN) == kept


def _stamps(out: Path) -> dict[str, int]:
    kept = [path for name in ("model.safetensors", "record.json") for path in sorted(out.rglob(name))]
    return {str(path): path.stat().st_mtime_ns for path in kept}


def test_a_second_rank_goes_on_with_what_is_there_and_a_further_call_does_nothing(done: Path) -> None:
    before = _stamps(done)
    said: list[str] = []
    for rank in (0, 1):
        assert conductor.conduct(study(), done, ORIGIN, jobs=1, rank=rank, world=2, say=said.append) == []
    after = _stamps(done)
    assert {path: after[path] for path in before} == before and len(after) > len(before)
    assert results.collect(study(), done).missing == []
    assert conductor.conduct(study(), done, ORIGIN, jobs=1, say=said.append) == []
    assert _stamps(done) == after
    assert "18/18" in said[-1]


def test_an_interrupted_cell_goes_on_where_it_was(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    longer = replace(study(), training=replace(study().training, epochs=2))
    cell = Cell("none", "resnet8", "ce", 0)
    whole = work.train(longer, cell, tmp_path / "whole", ORIGIN)

    evaluate, calls = run.evaluate_model, []

    def interrupted(*arguments: object) -> object:
        calls.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "evaluate_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        work.train(longer, cell, tmp_path / "cut", ORIGIN)
    assert calls and (cells.cell_folder(tmp_path / "cut", cell) / "checkpoints").exists()
    assert results.collect(longer, tmp_path / "cut").cells == {}
    monkeypatch.setattr(run, "evaluate_model", evaluate)
    record = work.train(longer, cell, tmp_path / "cut", ORIGIN)
    assert record["test_accuracy"] == whole["test_accuracy"]
    assert [e["epoch"] for e in read_metrics(cells.cell_folder(tmp_path / "cut", cell) / "metrics.jsonl", "epoch")] == [
        1,
        2,
    ]


def test_two_that_want_the_same_piece_do_it_once(tmp_path: Path) -> None:
    began, go, calls = threading.Event(), threading.Event(), []

    def slow(folder: Path) -> dict[str, object]:
        calls.append(folder)
        began.set()
        assert go.wait(10)
        return {"name": "x"}

    def once() -> None:
        work._once("pool", tmp_path / "x", "abc", ORIGIN, slow)

    threads = [threading.Thread(target=once) for _ in range(2)]
    threads[0].start()
    assert began.wait(10)
    threads[1].start()
    go.set()
    for thread in threads:
        thread.join(10)
    assert len(calls) == 1


def test_failures_are_named_and_cost_nobody_else_anything(done: Path, tmp_path: Path) -> None:
    broken = replace(
        study(),
        seeds=(0,),
        teachers=(*study().teachers, TeacherSpec("odd", "resnet8", swapped=(0, 99))),
        pools=(Pool("odd", ("odd",)),),
        variants=(Variant("ce", "ce"), Variant("aver", "aver")),
    )
    failures = conductor.conduct(broken, tmp_path, ORIGIN, jobs=1, say=lambda text: None)
    assert [failure.split(" failed: ")[0] for failure in failures] == [
        "teacher odd",
        "cache of odd",
        "odd/resnet8/aver/seed-0",
    ]
    assert "[0, 10), got 0 and 99" in failures[0] and "needs the cache of pool odd" in failures[2]
    assert len(results.collect(broken, tmp_path).cells) == 1


def test_other_settings_in_the_same_folder_are_refused_by_name(done: Path) -> None:
    other = replace(study(), training=replace(study().training, weight_decay=0.1))
    with pytest.raises(RuntimeError, match=r"begun with optim.weight_decay 0.0005 instead of 0.1"):
        work.train(other, Cell("none", "resnet8", "ce", 0), done, ORIGIN)


# --- results ---------------------------------------------------------------------------------------------------------


def test_results_are_sorted_lines_that_machines_can_merge(tmp_path: Path) -> None:
    whole = invented(lambda cell: 0.5)
    whole.write(tmp_path / "a.jsonl")
    halves = [results.Results(whole.study) for _ in range(2)]
    everything = [*whole.teachers.values(), *whole.pools.values(), *whole.cells.values()]
    for half, records in zip(halves, (everything[1::2], everything[::2]), strict=True):
        half.add(records)
        assert half.missing
    halves[0].write(tmp_path / "b.jsonl")
    merged = results.read(whole.study, tmp_path / "b.jsonl")
    merged.add(everything[::2])
    merged.write(tmp_path / "b.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert results.read(whole.study, tmp_path / "a.jsonl") == whole and not whole.missing


def test_results_of_other_settings_do_not_count(tmp_path: Path) -> None:
    whole = invented(lambda cell: 0.5)
    whole.write(tmp_path / "a.jsonl")
    other = replace(whole.study, training=replace(whole.study.training, epochs=3))
    read = results.read(other, tmp_path / "a.jsonl")
    assert read.cells == {} and read.teachers == whole.teachers and read.pools == whole.pools
    assert results.read(whole.study, tmp_path / "none.jsonl").missing == cells.cells(whole.study)


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"kind": "cell", "hash": ""}\n'[:-9] + "\n")
    with pytest.raises(ValueError, match=r"a.jsonl, line 1 is no record"):
        results.read(study(), tmp_path / "a.jsonl")


# --- the command and the check ---------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(plain(study())))
    return path


def test_the_check_agrees_with_what_is_so_and_finds_what_is_not(
    done: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = results.collect(study(), done)
    one = Cell("bad", "resnet8", "ca-mkd", 0)
    only = results.Results(study(), known.teachers, known.pools, {one: known.cells[one]})
    only.write(tmp_path / "r.jsonl")
    line = f"compare --study {file} --out {done} --results {tmp_path / 'r.jsonl'} --jobs 1 --check 1"
    assert cli.main(line.split()) == 0
    assert "bad/resnet8/ca-mkd/seed-0: " in (printed := capsys.readouterr().out) and printed.endswith("now: equal\n")
    only.cells[one]["test_accuracy"] += 1 / 597
    only.write(tmp_path / "r.jsonl")
    assert cli.main(line.split()) == 1
    assert capsys.readouterr().out.endswith("now: DIFFERENT\n")
    assert not list(done.glob(".check-*"))


def test_what_the_results_hold_is_not_done_again_on_another_machine(
    done: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of results is all that a study needs to go on: runs and caches may be lost."""
    known = results.collect(study(), done)
    known.write(tmp_path / "r.jsonl")
    line = f"compare --study {file} --out {tmp_path / 'new'} --results {tmp_path / 'r.jsonl'} --jobs 1"
    assert cli.main(line.split()) == 0
    assert f"{len(known.cells)} cells, 0 missing" in capsys.readouterr().out
    assert not (tmp_path / "new" / "teachers").exists()
    lost = next(cell for cell in known.cells if cell.variant == "ce")
    del known.cells[lost]
    known.write(tmp_path / "r.jsonl")
    assert cli.main(line.split()) == 0
    told = capsys.readouterr().out
    assert f"1/1  {lost}" in told and "0 missing" in told
    assert lost in results.read(study(), tmp_path / "r.jsonl").cells


def test_checked_cells_are_random_ones_that_are_finished() -> None:
    known = invented(lambda cell: 0.5)
    assert check.choose(known, 3, seed=1) == check.choose(known, 3, seed=1)
    assert len({tuple(check.choose(known, 3, seed=s)) for s in range(9)}) > 1
    assert len(check.choose(known, 999, seed=0)) == len(known.cells)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--temperature 2", "beside --study only --out, --jobs, --results, --check count"),
        ("--seeds 1", "beside --study only"),
        ("--jobs 0", "jobs must be at least 1, got 0"),
        ("--check 2", "holds no finished cell"),
    ],
)
def test_a_study_takes_its_settings_from_its_file(
    file: Path, tmp_path: Path, options: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(f"compare --study {file} --out {tmp_path / 'o'} {options}".split()) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


@pytest.mark.slow
def test_the_quick_study_under_torchrun(tmp_path: Path) -> None:
    """Two ranks that share a folder and do not talk: every cell once, each teacher and cache once."""
    command = ["compare", "--study", str(STUDIES / "quick.yaml"), "--out", str(tmp_path), "--jobs", "1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29719"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, "-m", "camkd_fast", *command],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    quick = spec.load(STUDIES / "quick.yaml")
    kept = results.read(quick, tmp_path / "results.jsonl")
    assert kept.missing == [] and len(kept.teachers) == len(quick.teachers)
    trained = [line for line in done.stdout.splitlines() if "/resnet8/" in line]
    assert len(trained) == len(kept.cells)
    assert (tmp_path / "report.html").exists()


@pytest.mark.slow
def test_the_quick_study_and_its_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"compare --study {STUDIES / 'quick.yaml'} --out {tmp_path} --jobs 2"
    assert cli.main(line.split()) == 0
    assert "30 cells, 0 missing" in capsys.readouterr().out
    for written in (tmp_path / "results.jsonl").read_text().splitlines():
        json.loads(written)
    assert cli.main(f"{line} --check 3".split()) == 0
    assert capsys.readouterr().out.count("now: equal") == 3
