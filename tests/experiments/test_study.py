"""Running a study: each piece runs once, results merge, and the check finds differences."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from camkd_fast import cli, system
from camkd_fast.experiments.study import cells, check, conductor, records, spec, study_report, work
from camkd_fast.experiments.study.cells import Cell
from camkd_fast.experiments.study.spec import Pool, TeacherSpec, Variant
from camkd_fast.train import run, run_images
from camkd_fast.train.config_file import serializable
from camkd_fast.train.journal import read_metrics
from tests.support.loader_data import fashion_folder
from tests.support.study_parts import ORIGIN, invented, study

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "benchmarks" / "study"

pytestmark = pytest.mark.usefixtures("one_thread")


# --- from end to end -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with seed 0 finished by two workers."""
    out = tmp_path_factory.mktemp("study")
    failures = conductor.conduct(replace(study(), seeds=(0,)), out, ORIGIN, jobs=2, progress=lambda text: None)
    assert failures == []
    return out


@pytest.mark.slow
def test_every_cell_leaves_its_record(done: Path) -> None:
    found = records.collect(study(), done)
    assert len(found.cells) == 9 and {cell.seed for cell in found.missing} == {1} and len(found.teachers) == 4
    for cell, record in found.cells.items():
        assert records.cell_of(record) == cell and record["commit"] == ORIGIN["commit"] and len(record["hash"]) == 12
        assert 0.0 <= record["test_accuracy"] <= 1.0 and 0.0 <= record["test_calibration"] <= 1.0
        assert record["test_images"] == 597 and len(record["validation_accuracy"]) == 1
        assert not (cells.cell_folder(done, cell) / "checkpoints").exists()
    camkd = found.cells[Cell("bad", "resnet8", "ca-mkd", 0)]
    assert sum(camkd["weights"][0]) == pytest.approx(1.0, abs=1e-4)
    by_class = torch.tensor(camkd["class_feature_weights"])
    assert by_class.shape == (3, 10)
    torch.testing.assert_close(by_class.sum(0), torch.ones(10), rtol=1e-4, atol=0)
    assert "class_feature_weights" not in found.cells[Cell("good", "resnet8", "ca-mkd", 0)]


@pytest.mark.slow
def test_the_pools_weights_are_those_of_its_runs(done: Path) -> None:
    found = records.collect(study(), done)
    # One epoch uses view 0, as the pool's record does; the mean over classes is weighted by their sizes.
    labels = run_images.training_set(*_training(done))[0].labels
    share = torch.bincount(labels, minlength=10) / len(labels)
    for pool in ("good", "bad"):
        expected = (torch.tensor(found.pools[pool]["confidence"]) * share).sum(1)
        logged = torch.tensor(found.cells[Cell(pool, "resnet8", "ca-mkd", 0)]["weights"][-1])
        torch.testing.assert_close(logged, expected, rtol=3e-4, atol=0)


def _training(out: Path) -> tuple[object, object, object]:
    from camkd_fast.train.distributed import World

    config = cells.student_config(study(), Cell("bad", "resnet8", "ca-mkd", 0), out)
    return config, run_images.load_splits(config.data).train, World(0, 1, torch.device("cpu"))


@pytest.mark.slow
def test_the_best_teacher_is_the_best_on_validation_images(done: Path) -> None:
    found = records.collect(study(), done)
    for pool in study().pools:
        accuracies = [found.teachers[name]["validation_accuracy"] for name in pool.teachers]
        weights = found.cells[Cell(pool.name, "resnet8", "best", 0)]["weights"][0]
        assert weights.index(1.0) == accuracies.index(max(accuracies))


@pytest.mark.slow
def test_an_over_confident_teacher_is_as_right_as_its_source(done: Path) -> None:
    found = records.collect(study(), done).teachers
    assert found["loud"]["test_accuracy"] == found["good-1"]["test_accuracy"]
    assert found["loud"]["test_loss"] != found["good-1"]["test_loss"]


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_second_rank_goes_on_with_what_is_there_and_a_further_call_does_nothing(done: Path) -> None:
    before = _stamps(done)
    said: list[str] = []
    for rank in (0, 1):
        assert conductor.conduct(study(), done, ORIGIN, jobs=1, rank=rank, world=2, progress=said.append) == []
    after = _stamps(done)
    assert {path: after[path] for path in before} == before and len(after) > len(before)
    assert records.collect(study(), done).missing == []
    assert conductor.conduct(study(), done, ORIGIN, jobs=1, progress=said.append) == []
    assert _stamps(done) == after
    assert "18/18" in said[-1]


@pytest.mark.slow
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
    assert records.collect(longer, tmp_path / "cut").cells == {}
    monkeypatch.setattr(run, "evaluate_model", evaluate)
    folder = cells.cell_folder(tmp_path / "cut", cell)
    with monkeypatch.context() as patch:
        patch.setattr(work, "write_atomically", interrupted)
        with pytest.raises(KeyboardInterrupt):
            work.train(longer, cell, tmp_path / "cut", ORIGIN)
    assert (folder / "checkpoints").exists()  # without a record, the next attempt needs them
    record = work.train(longer, cell, tmp_path / "cut", ORIGIN)
    assert not (folder / "checkpoints").exists()
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


@pytest.mark.slow
def test_failures_are_named_and_cost_nobody_else_anything(done: Path, tmp_path: Path) -> None:
    broken = replace(
        study(),
        seeds=(0,),
        teachers=(*study().teachers, TeacherSpec("odd", "resnet8", swapped=(0, 99))),
        pools=(Pool("odd", ("odd",)),),
        variants=(Variant("ce", "ce"), Variant("aver", "aver")),
    )
    failures = conductor.conduct(broken, tmp_path, ORIGIN, jobs=1, progress=lambda text: None)
    assert [failure.split(" failed: ")[0] for failure in failures] == [
        "teacher odd",
        "cache of odd",
        "odd/resnet8/aver/seed-0",
    ]
    assert "[0, 10), got 0 and 99" in failures[0] and "needs the cache of pool odd" in failures[2]
    assert len(records.collect(broken, tmp_path).cells) == 1


@pytest.mark.slow
def test_other_settings_in_the_same_folder_are_refused_by_name(done: Path) -> None:
    other = replace(study(), training=replace(study().training, weight_decay=0.1))
    with pytest.raises(RuntimeError, match=r"started with optim.weight_decay 0.0005 instead of 0.1"):
        work.train(other, Cell("none", "resnet8", "ce", 0), done, ORIGIN)


# --- results ---------------------------------------------------------------------------------------------------------


def test_results_are_sorted_lines_that_machines_can_merge(tmp_path: Path) -> None:
    whole = invented(lambda cell: 0.5)
    whole.write(tmp_path / "a.jsonl")
    halves = [records.Results(whole.study) for _ in range(2)]
    everything = [*whole.teachers.values(), *whole.pools.values(), *whole.cells.values()]
    for half, part in zip(halves, (everything[1::2], everything[::2]), strict=True):
        half.add(part)
        assert half.missing
    halves[0].write(tmp_path / "b.jsonl")
    merged = records.read(whole.study, tmp_path / "b.jsonl")
    merged.add(everything[::2])
    merged.write(tmp_path / "b.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert records.read(whole.study, tmp_path / "a.jsonl") == whole and not whole.missing


def test_results_of_other_settings_do_not_count(tmp_path: Path) -> None:
    whole = invented(lambda cell: 0.5)
    whole.write(tmp_path / "a.jsonl")
    other = replace(whole.study, training=replace(whole.study.training, epochs=3))
    read = records.read(other, tmp_path / "a.jsonl")
    assert read.cells == {} and read.teachers == whole.teachers and read.pools == whole.pools
    assert records.read(whole.study, tmp_path / "none.jsonl").missing == cells.cells(whole.study)


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"kind": "cell", "hash": ""}\n'[:-9] + "\n")
    with pytest.raises(ValueError, match=r"a.jsonl, line 1 is no record"):
        records.read(study(), tmp_path / "a.jsonl")


# --- the command and the check ---------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(serializable(study())))
    return path


@pytest.mark.slow
def test_the_check_agrees_with_what_is_so_and_finds_what_is_not(
    done: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = records.collect(study(), done)
    one = Cell("bad", "resnet8", "ca-mkd", 0)
    only = records.Results(study(), known.teachers, known.pools, {one: known.cells[one]})
    only.write(tmp_path / "r.jsonl")
    line = f"compare --study {file} --out {done} --results {tmp_path / 'r.jsonl'} --jobs 1 --check 1"
    assert cli.main(line.split()) == 0
    assert "bad/resnet8/ca-mkd/seed-0: " in (printed := capsys.readouterr().out) and printed.endswith("now: equal\n")
    only.cells[one]["test_accuracy"] += 1 / 597
    only.write(tmp_path / "r.jsonl")
    assert cli.main(line.split()) == 1
    assert capsys.readouterr().out.endswith("now: DIFFERENT\n")
    assert not list(done.glob(".check-*"))


@pytest.mark.slow
def test_the_check_needs_nothing_but_the_results(
    done: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a fresh clone: missing teachers, including the source of a derived one, are trained first and kept."""
    known = records.collect(study(), done)
    one, out = Cell("bad", "resnet8", "ca-mkd", 0), tmp_path / "new"
    records.Results(study(), known.teachers, known.pools, {one: known.cells[one]}).write(tmp_path / "r.jsonl")
    line = f"compare --study {file} --out {out} --results {tmp_path / 'r.jsonl'} --jobs 1 --check 1"
    assert cli.main(line.split()) == 0
    assert capsys.readouterr().out.endswith("now: equal\n")
    assert {folder.name for folder in (out / "teachers").iterdir()} == {"good-0", "good-1", "swapped", "loud"}
    assert all((folder / "record.json").exists() for folder in (out / "teachers").iterdir())


@pytest.mark.slow
def test_what_the_results_hold_is_not_done_again_on_another_machine(
    done: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A study resumes from its file of results, even without runs and caches."""
    of = replace(study(), seeds=(0,))
    file.write_text(yaml.safe_dump(serializable(of)))
    known = records.collect(of, done)
    known.write(tmp_path / "r.jsonl")
    line = f"compare --study {file} --out {tmp_path / 'new'} --results {tmp_path / 'r.jsonl'} --jobs 1"
    assert cli.main(line.split()) == 0
    assert f"{len(known.cells)} cells, 0 missing" in capsys.readouterr().out
    assert not (tmp_path / "new" / "teachers").exists()
    lost = next(cell for cell in known.cells if cell.variant == "ce")
    del known.cells[lost]
    known.write(tmp_path / "r.jsonl")
    assert cli.main(line.split()) == 0
    printed = capsys.readouterr().out
    assert f"1/1  {lost}" in printed and "0 missing" in printed
    assert lost in records.read(of, tmp_path / "r.jsonl").cells


def test_checked_cells_are_random_ones_that_are_finished() -> None:
    known = invented(lambda cell: 0.5)
    assert check.choose(known, 3, seed=1) == check.choose(known, 3, seed=1)
    assert len({tuple(check.choose(known, 3, seed=s)) for s in range(9)}) > 1
    assert len(check.choose(known, 999, seed=0)) == len(known.cells)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--temperature 2", "with --study only --out, --jobs, --results, --check are allowed"),
        ("--seeds 1", "with --study only"),
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
    """Two ranks that share a folder: every cell, teacher and cache runs once."""
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
    kept = records.read(quick, tmp_path / "results.jsonl")
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


@pytest.mark.slow
def test_the_study_of_cifar_size_on_a_few_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of its models, strategies and steps, but shorter: the full study needs a GPU."""
    monkeypatch.setenv("CAMKD_FAST_DATA", str(tmp_path / "data"))
    fashion_folder(tmp_path / "data" / "fashion-mnist", train=60, test=20)
    full = spec.load(STUDIES / "cifar_size.yaml")
    small = replace(
        full,
        seeds=(0,),
        training=replace(full.training, epochs=1, batch_size=16),
        teaching=replace(full.teaching, epochs=1, batch_size=16),
    )
    out = tmp_path / "out"
    assert conductor.conduct(small, out, ORIGIN, jobs=2, progress=lambda text: None) == []
    kept = records.collect(small, out)
    assert kept.missing == [] and len(kept.cells) == 1 + 2 * 7
    assert run_images.load_splits(small.data).train.shape == (1, 32, 32)
    assert small.title in study_report.write(kept, out / "report.html").read_text()


@pytest.mark.slow
def test_a_signal_ends_the_workers_at_once(tmp_path: Path) -> None:
    """It arrives in the main process only; the pieces would take on for hours."""

    def stop(text: str) -> None:
        raise system.Stopped(signal.SIGTERM)

    endless = replace(study(), teaching=replace(study().teaching, epochs=100_000))
    spec_of_one = replace(endless.teachers[0], epochs=1)
    endless = replace(endless, teachers=(spec_of_one, *endless.teachers[1:]))
    with pytest.raises(system.Stopped):
        conductor.conduct(endless, tmp_path, ORIGIN, jobs=2, progress=stop)
    for child in multiprocessing.active_children():
        child.join(20)
    assert not multiprocessing.active_children()
