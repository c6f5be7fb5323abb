"""The list of wrong changes fits the code as it is, and the command finds what tests do not notice."""

from __future__ import annotations

import ast
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.mutants import AREAS, Change, load
from tests.mutants import __main__ as command
from tests.mutants.__main__ import Outcome, chosen, kept, named_tests, summary

ROOT = Path(__file__).parents[2]
CHANGES = list(load())


def test_every_old_text_occurs_exactly_once() -> None:
    texts = {change.file: (ROOT / change.file).read_text() for change in CHANGES}
    stale = [
        f"{change.title}: {count} times in {change.file}: {change.old!r}"
        for change in CHANGES
        if (count := texts[change.file].count(change.old)) != 1
    ]
    assert not stale, f"{len(stale)} entries of tests/mutants need another text:\n" + "\n".join(stale)


def test_every_named_test_exists() -> None:
    functions: dict[str, set[str]] = {}
    missing = []
    for test in named_tests(CHANGES):
        file, _, name = test.partition("::")
        if not (ROOT / file).exists():
            missing.append(test)
        elif name:
            if file not in functions:
                tree = ast.parse((ROOT / file).read_text())
                functions[file] = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            if name.partition("[")[0] not in functions[file]:
                missing.append(test)
    assert not missing, "tests/mutants names tests that do not exist:\n" + "\n".join(missing)


def test_every_area_has_changes_of_its_own_name() -> None:
    assert len([change for change in CHANGES if not change.equivalent]) >= 100
    assert {change.area for change in CHANGES} == set(AREAS)
    titles = Counter(change.title for change in CHANGES)
    assert not [title for title, count in titles.items() if count > 1]
    assert all(change.old != change.new and change.tests for change in CHANGES)


def test_changes_are_chosen_by_area_or_by_words() -> None:
    assert chosen(CHANGES, []) == CHANGES
    assert {change.area for change in chosen(CHANGES, ["models"])} == {"models"}
    assert [change.name for change in chosen(CHANGES, ["rank is not in"])] == ["rank is not in the seed"]


def test_the_summary_names_what_survived() -> None:
    one, two = Change("one", "a", "b", "t.py", file="x.py", area="cpu"), Change("two", "a", "b", "u.py", area="cpu")
    text = summary([Outcome(one, "survived"), Outcome(two, "caught", "FAILED u.py")], 3)
    assert text.splitlines()[:2] == ["cpu: one (x.py)", "  t.py"]
    assert "cpu: two" not in text and "1 caught, 1 survived, 0 broken (50.0 % caught); 3 equivalent" in text


def test_results_are_kept_while_change_file_and_tests_are_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    files = {name: tmp_path / name for name in ("a.h", "tests/t.py", "tests/u.py", "b.h")}
    for file in files.values():
        file.write_text("one")
    one = Change("one", "a", "b", "tests/t.py::test tests/u.py", file="a.h", area="cpu")
    done = Outcome(one, "caught", "FAILED", 2.0)
    (tmp_path / "results.jsonl").write_text(json.dumps(done.record) + "\n")
    results = [tmp_path / "results.jsonl"]
    assert kept([one], results) == [done] and kept([one], [tmp_path / "tests" / "results.jsonl"]) == []
    assert kept([replace(one, new="c")], results) == []
    for name, file in files.items():
        file.write_text("two")
        assert (kept([one], results) == [done]) == (name == "b.h")
        file.write_text("one")


def test_results_are_recorded_and_a_later_pass_runs_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.h").write_text("one")
    one, two = (Change(name, "a", "b", "a.h", file="a.h", area="cpu") for name in ("one", "two"))
    record, ran = tmp_path / "record.jsonl", []

    def run(listed: list[Change], jobs: int, limit: float, folder: Path) -> list[Outcome]:
        ran.append(listed)
        outcomes = [Outcome(change, "caught", "FAILED", 2.4) for change in listed]
        with (folder / "results.jsonl").open("a") as file:
            file.writelines(json.dumps(outcome.record) + "\n" for outcome in outcomes)
        return outcomes

    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(command, "RECORD", record)
    monkeypatch.setattr(command, "run", run)

    def a_pass(listed: list[Change], folder: str) -> list[str]:
        monkeypatch.setattr(command, "load", lambda: listed)
        monkeypatch.setattr("sys.argv", ["mutants", "--resume", "--record", "--folder", str(tmp_path / folder)])
        assert command.main() == 0
        return [json.loads(line)["title"] for line in record.read_text().splitlines()]

    assert a_pass([one], "first") == ["cpu: one"]
    assert a_pass([one, two], "second") == ["cpu: one", "cpu: two"]
    assert a_pass([one, two], "third") == ["cpu: one", "cpu: two"]
    assert ran == [[one], [two]]
    (tmp_path / "a.h").write_text("two")
    assert a_pass([two], "fourth") == ["cpu: two"] and ran[-1] == [two]


@pytest.mark.slow
def test_the_command_tells_caught_from_survived(tmp_path: Path) -> None:
    from tests.mutants.scratch import Tree

    pytest.importorskip("pybind11")
    drop = Change("drop", "optim.drop ** sum", "0.5 ** sum", file="camkd_fast/train/schedule.py")
    docs = Change("docs", "a resumed run needs no scheduler state", "a run", file="camkd_fast/train/schedule.py")
    compiled = Change("square", "scale_by_t2 ? T * T", "scale_by_t2 ? T", file="csrc/row_math.h")
    tree = Tree(tmp_path)
    try:
        rates = ["tests/train/test_options.py::test_the_rate_follows_the_config"]
        losses = ["tests/losses/test_formulas.py::test_coefficients"]
        assert tree.pytest([*rates, *losses], 300) == 0
        with tree.changed(drop):
            assert tree.pytest(rates, 300) == 1 and "test_the_rate_follows_the_config" in tree.last_failure()
        with tree.changed(docs):
            assert tree.pytest(rates, 300) == 0
        with tree.changed(compiled):
            assert tree.pytest(losses, 300) == 1
        assert tree.pytest([*rates, *losses], 300) == 0
    finally:
        tree.close()
