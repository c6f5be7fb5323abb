"""Comparison: finished cells are kept, other settings rejected, and the table follows from the runs' results."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch

from camkd_fast import cli
from camkd_fast.experiments import compare, compare_report
from camkd_fast.experiments.compare import CompareConfig, Row
from camkd_fast.train import run
from camkd_fast.train.config import DataConfig, DistillConfig, LogConfig, OptimConfig, TeachConfig
from camkd_fast.train.run_folder import RunExistsError

DATA = DataConfig(images=60, augmentation="none")
QUIET = LogConfig(tensorboard=False, progress=False)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    folder = tmp_path_factory.mktemp("teachers")
    paths = tuple(folder / f"t{k}" for k in (0, 1))
    for k, out in enumerate(paths):
        run.teach(TeachConfig("resnet8", k, out, data=DATA, optim=OptimConfig(epochs=1), log=QUIET))
    return paths


def config(teachers: tuple[Path, ...], out: Path, **changes: object) -> CompareConfig:
    student = DistillConfig("resnet8", teachers, out=out, data=DATA, optim=OptimConfig(epochs=1), log=QUIET)
    return replace(CompareConfig(("ce", "aver"), (0, 1), student), **changes)


def test_cells_are_every_strategy_of_a_seed_before_the_next_seed(tmp_path: Path) -> None:
    student = DistillConfig("vgg8", beta=7.0, strategy="kd", seed=9, out=tmp_path)
    cells = list(CompareConfig(("aver", "ca-mkd"), (3, 5), student).cells())
    assert [(cell.strategy, cell.seed) for cell in cells] == [("aver", 3), ("ca-mkd", 3), ("aver", 5), ("ca-mkd", 5)]
    # Strategies without a feature term refuse a beta.
    assert [cell.beta for cell in cells] == [None, 7.0, None, 7.0]
    assert cells[3].out == tmp_path / "ca-mkd" / "seed-5"
    assert len({cell.out for cell in cells}) == 4
    same = replace(cells[1], strategy="kd", seed=9, out=tmp_path)
    assert same == student


def test_unknown_strategies_are_refused_before_the_first_cell_is_trained() -> None:
    with pytest.raises(ValueError, match="no strategy is named 'camkd'; nearest: ca-mkd"):
        list(config((), Path("out"), strategies=("aver", "camkd")).cells())


def test_missing_teachers_are_refused_before_the_first_cell_is_trained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kd, ca-mkd learn from teachers, but none were given"):
        compare.check_teachers(config((), tmp_path, strategies=("ce", "kd", "ca-mkd")))
    compare.check_teachers(config((), tmp_path, strategies=("ce",)))


def test_finished_cells_are_kept_and_an_interrupted_comparison_goes_on(
    teachers: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = config(teachers, tmp_path)
    first = list(both.cells())[:3]
    for cell in first:
        compare.run_cell(cell)
    with pytest.raises(ValueError, match=r"aver.seed-1 holds no finished run"):
        compare.collect(both)
    before = {cell.out: (cell.out / "model.safetensors").stat().st_mtime_ns for cell in first}
    metrics = [(cell.out / "metrics.jsonl").read_bytes() for cell in first]
    for cell in both.cells():
        compare.run_cell(cell)
    assert before == {cell.out: (cell.out / "model.safetensors").stat().st_mtime_ns for cell in first}
    assert metrics == [(cell.out / "metrics.jsonl").read_bytes() for cell in first]
    assert [row.strategy for row in compare.collect(both)] == ["ce", "aver"]

    # More seeds and strategies may be added; other settings may not.
    wider = config(teachers, tmp_path, strategies=("aver", "ce", "ca-mkd"), seeds=(1,))
    for cell in wider.cells():
        compare.run_cell(cell)
    assert compare.collect(wider)[0].test_accuracy == compare.collect(both)[1].test_accuracy[1:]
    other = config(teachers, tmp_path, student=replace(both.student, alpha=0.5, optim=OptimConfig(epochs=2)))
    with pytest.raises(RunExistsError, match=r"seed-0 .* alpha 1\.0 instead of 0\.5, optim\.epochs 1 instead of 2"):
        compare.run_cell(next(other.cells()))
    compare.run_cell(next(other.cells()), overwrite=True)


def rows() -> list[Row]:
    def row(name: str, accuracy: list[float]) -> Row:
        epochs = [
            [{"epoch": 1, "validation_accuracy": a - 0.1}, {"epoch": 2, "validation_accuracy": a}] for a in accuracy
        ]
        return Row(name, accuracy, 100.0, epochs)

    return [row("ce", [0.5, 0.6, 0.9]), row("aver", [0.4, 0.6, 0.8]), row("ca-mkd", [0.6, 0.7, 0.7])]


def test_differences_are_paired_by_seed() -> None:
    ce, aver, camkd = rows()
    assert compare.baseline([ce, aver, camkd]) is aver and compare.baseline([ce]) is None
    assert camkd.gains(aver) == pytest.approx([0.2, 0.1, -0.1])
    lines = compare_report.student_table(rows()).rows
    gains = [20.0, 10.0, -10.0]
    assert list(lines[2]) == [
        "CA-MKD",
        "66.67 %",
        f"{100 * stdev([0.6, 0.7, 0.7]):.2f}",
        "60.0, 70.0, 70.0",
        f"{mean(gains):+.2f} ± {stdev(gains):.2f}",
        "100",
    ]
    assert lines[1][4] == ""  # AVER compared with itself
    table = compare_report.student_table([ce, camkd])
    assert "over AVER, paired" not in table.header and len(table.rows[0]) == 5
    single = Row("ce", [0.5], 1.0, [[]])
    assert (single.mean, single.spread) == (0.5, 0.0)


def test_rates_are_of_the_runs_that_were_timed(tmp_path: Path) -> None:
    both = config((), tmp_path, strategies=("ce", "aver"), seeds=(0, 1, 2))
    for cell, speed in zip(both.cells(), (0.0, 0.0, 0.3, 0.0, 0.5, 0.0), strict=True):
        cell.out.mkdir(parents=True)
        record = {"kind": "test", "step": 1, "epoch": 1, "test_accuracy": 0.5, "images_per_second": speed}
        (cell.out / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        (cell.out / "model.safetensors").touch()
    rows = compare.collect(both)
    assert [row.images_per_second for row in rows] == [0.4, 0.0]
    assert [row[-1] for row in compare_report.student_table(rows).rows] == ["0.4", ""]


def test_report_and_json(teachers: tuple[Path, ...], tmp_path: Path) -> None:
    three = config(teachers, tmp_path, strategies=("ce", "aver", "ca-mkd"), seeds=(0, 1, 2))
    page = compare_report.write(three, rows(), {"torch": torch.__version__}).read_text()
    assert page.count('<img alt="') == 3 and "http" not in page
    for words in ("resnet8 on digits: strategies compared", "Difference to AVER", "+6.67 ± 15.28", "All settings"):
        assert words in page
    written = json.loads((tmp_path / "compare.json").read_text())
    assert written["seeds"] == [0, 1, 2] and written["student"]["student"] == "resnet8"
    camkd = written["results"][2]
    assert camkd["strategy"] == "ca-mkd" and camkd["test_accuracy"]["seeds"] == [0.6, 0.7, 0.7]
    assert camkd["difference_to_aver"]["mean"] == pytest.approx(1 / 15)

    # Runs have a test accuracy; other teachers are named by their strings.
    others = (*teachers, "timm:net.in1k", "resnet8@folder/a.pth?size=8")
    named = compare_report.write(config(others, tmp_path, strategies=("ce",), seeds=(0,)), rows()[:1], {}).read_text()
    assert "Teachers: " in named and "t1, timm:net.in1k, resnet8@folder/a.pth?size=8." in named

    lone = config((), tmp_path, strategies=("ce",), seeds=(0,))
    page = compare_report.write(lone, [Row("ce", [0.5], 1.0, [[]])], {}).read_text()
    assert page.count('<img alt="') == 1 and "Teachers: none" in page


def test_the_command_prints_the_table_and_keeps_cells(
    teachers: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = (
        f"compare --strategies ce aver --seeds 0 1 --student resnet8 --teachers {teachers[0]} {teachers[1]} "
        "--images 60 --epochs 1 --no-progress --no-tensorboard --out runs/c"
    )
    assert cli.main(line.split()) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("ce, seed 0 (1 of 4)\naver, seed 0 (2 of 4)\n") and "over AVER, paired" in printed
    stamps = [path.stat().st_mtime_ns for path in sorted(Path("runs/c").glob("*/*/model.safetensors"))]
    assert cli.main(line.split()) == 0
    assert capsys.readouterr().out == printed
    assert stamps == [path.stat().st_mtime_ns for path in sorted(Path("runs/c").glob("*/*/model.safetensors"))]
    assert len(stamps) == 4

    assert cli.main([*line.split(), "--temperature", "2"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "ce/seed-0 cannot be resumed, as it was started with temperature 4.0" in error

    # It can start from the config of any student.
    again = f"compare --config runs/c/aver/seed-1/config.yaml --strategies aver --seeds 1 --out {tmp_path / 'd'}"
    assert cli.main(again.split()) == 0
    model = Path("aver") / "seed-1" / "model.safetensors"
    assert (tmp_path / "d" / model).read_bytes() == (tmp_path / "runs/c" / model).read_bytes()


@pytest.mark.parametrize("seeds", [(0, 1), (1, 0)])
def test_cells_of_a_teacher_that_was_trained_again_are_not_compared_with_earlier_ones(
    teachers: tuple[Path, ...], tmp_path: Path, seeds: tuple[int, ...]
) -> None:
    """Neither before a cell is trained nor, for cells of two commands, in the table."""
    teacher = tmp_path / "t"
    shutil.copytree(teachers[0], teacher)

    def trained(seeds: tuple[int, ...], overwrite: bool = False) -> CompareConfig:
        both = config((teacher,), tmp_path / "out", seeds=seeds, strategies=("ce", "aver", "ebkd"))
        for number, cell in enumerate(both.cells()):
            compare.run_cell(cell, overwrite, compared=compare.kept(both, number, overwrite))
        return both

    compare.collect(trained((0,)))
    shutil.rmtree(teacher)
    shutil.copytree(teachers[1], teacher)
    with pytest.raises(
        RunExistsError, match=rf"seed-1 and .*aver.seed-0 cannot be compared: teacher {teacher} has other"
    ):
        trained(seeds)
    trained((1,))
    with pytest.raises(RunExistsError, match=r"cannot be compared: teacher .*--overwrite trains all"):
        compare.collect(config((teacher,), tmp_path / "out", seeds=seeds, strategies=("ce", "aver", "ebkd")))
    assert len(compare.collect(trained(seeds, overwrite=True))) == 3
