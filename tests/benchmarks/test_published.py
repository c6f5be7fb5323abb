"""Publishing of results: test verdicts, the page, the tables of the documentation."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import doc_tables, figures, publish, results, verdict
from benchmarks.verdict import GREEN, RED, UNKNOWN
from camkd_fast.train import provenance

ROOT = Path(__file__).parents[2]


# --- verdicts --------------------------------------------------------------------------------------------------------


def session(*arguments: str, **options: Any) -> Any:
    """A pytest.Config of a session; of the whole suite if no arguments are given."""
    given = {"keyword": "", "markexpr": "", "deselect": None, "ignore": None, "ignore_glob": None, "collectonly": False}
    source = pytest.Config.ArgsSource.ARGS if arguments else pytest.Config.ArgsSource.TESTPATHS
    return SimpleNamespace(option=SimpleNamespace(**given | options), args=[*arguments], args_source=source)


@pytest.fixture
def stamp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(verdict, "commit", lambda: "abc")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path / "stamp.json"


def test_a_whole_green_session_makes_a_commit_green(stamp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdict.read("cpu", stamp) == UNKNOWN
    verdict.note(session(markexpr="not slow"), 0, stamp)
    assert verdict.read("cpu", stamp) == GREEN and verdict.read("cuda", stamp) == UNKNOWN
    monkeypatch.setattr(verdict, "commit", lambda: "abd")
    assert verdict.read("cpu", stamp) == UNKNOWN, "another commit"


@pytest.mark.parametrize(
    "part",
    [
        session("tests/losses/test_layout.py"),
        session("tests/gpu"),
        session(keyword="layout"),
        session(markexpr="slow"),
        session(deselect=["tests/losses/test_layout.py"]),
        session(lf=True),
        session(collectonly=True),
    ],
)
def test_a_part_of_the_suite_does_not(stamp: Path, part: Any) -> None:
    verdict.note(part, 0, stamp)
    assert not stamp.exists()


def test_any_failure_makes_a_commit_red_until_a_whole_session_passes(stamp: Path) -> None:
    verdict.note(session(), 0, stamp)
    verdict.note(session("tests/losses/test_layout.py"), 1, stamp)
    assert verdict.read("cpu", stamp) == RED and verdict.read("cuda", stamp) == RED
    verdict.note(session("tests/losses/test_layout.py"), 0, stamp)
    verdict.note(session(), 2, stamp)  # interrupted
    assert verdict.read("cpu", stamp) == RED
    verdict.note(session(), 0, stamp)
    assert verdict.read("cpu", stamp) == GREEN


def test_the_gpu_tests_count_for_the_gpu(stamp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    verdict.note(session(str(ROOT / "tests" / "gpu"), markexpr="not slow"), 0, stamp)
    assert verdict.read("cuda", stamp) == GREEN and verdict.read("cpu", stamp) == UNKNOWN
    verdict.note(session(), 0, stamp)
    assert verdict.read("cpu", stamp) == GREEN


@pytest.mark.parametrize("tree", ["abc+", "unknown"])
def test_a_tree_with_uncommitted_changes_has_no_verdict(tree: str) -> None:
    assert verdict.judge({"commit": tree, "cpu": GREEN}, tree, "cpu") == UNKNOWN


# --- page and tables -------------------------------------------------------------------------------------------------


def loss_result(device: str = "cpu", tests: str = GREEN) -> dict[str, Any]:
    """Two sizes against others and a range of C, as the suite writes them, with invented numbers."""
    ours = "camkd[cpu]" if device == "cpu" else "camkd[triton]"

    def entry(milliseconds: float) -> dict[str, Any]:
        peak = None if device == "cpu" else int(2e6 * milliseconds)
        times = {f"p{p}_ms": milliseconds * (1 + (p - 50) / 300) for p in (20, 50, 80)}
        return {end: times | {"peak_bytes": peak} for end in ("backward", "grad")}

    def row(grid: str, C: int, K: int, others: dict[str, float]) -> dict[str, Any]:
        over = dict.fromkeys(("backward", "grad"), others)
        times = {ours: entry(1.0)} | {name: entry(ratio) for name, ratio in others.items()}
        floor = (K + 2) * 10 * C * 4
        sizes = {"N": 10, "C": C, "K": K, "dtype": "float32", "floor_bytes": floor, "gradient_bytes": 40 * C}
        share = floor / 1e-3 / 1e9 / 20.0
        return {"grid": grid, **sizes, "ours": ours, "times": times, "over": over, "share_of_copy": share}

    rows = [row("compared", C, 3, {"eager": 9.0, "compile": 4.0}) for C in (100, 1000)]
    rows += [row("classes", C, K, {}) for K in (1, 3) for C in (100, 1000, 30000)]
    where = {
        "processor": "Some CPU", "instruction set": "avx2", "threads": "2", "GPU": "Some GPU", "torch": "2.13.0",
        "commit": "abc", "date": "2026-01-01", "device": device, "tests": tests,
    }  # fmt: skip
    return {"environment": where, "copy_gb_per_s": 20.0, "engine_start_us": 9.0, "rows": rows, "notes": []}


def place(root: Path, **devices: dict[str, Any]) -> Path:
    for name, result in devices.items():
        results.write(root / name, "logit_loss", result)
    return root


def test_equal_results_give_an_equal_page_plots_and_tables(tmp_path: Path) -> None:
    root = place(tmp_path / "results", cpu=loss_result(), gpu=loss_result("cuda"))
    text = tmp_path / "README.md"
    places = "".join(
        f"<!-- {name}: start -->\nold\n<!-- {name}: end -->\n" for name in ("headline", "logit_loss", "classes")
    )
    text.write_text(f"before\n{places}after\n")
    targets = (root, root / "report.html", [text], tmp_path / "docs" / "speedup.svg")
    written = publish.write(*targets)
    assert {str(path.relative_to(tmp_path)) for path in written} == {
        "README.md", "docs/speedup.svg", "results/report.html", "results/cpu/roofline.png", "results/cpu/speed_up.png",
        "results/gpu/roofline.png", "results/gpu/speed_up.png", "results/gpu/memory.png",
    }  # fmt: skip
    first = [path.read_bytes() for path in written]
    page = (root / "report.html").read_text()
    assert "Some CPU (avx2), 2 threads" in page and "Some GPU" in page and "http" not in page.replace("http-equiv", "")
    tables = text.read_text()
    assert tables.startswith("before\n") and tables.endswith("after\n") and "old" not in tables
    row = "| 10 x 1000 | 3 | float32 | 1.000 | 9.0x | 4.0x |"
    assert tables.count(row) == 4 and "Some GPU, torch" in tables, "headline and logit_loss of two devices"
    assert "| of copy at C = | 100 | 1000 | 30000 |" in tables and "| camkd[cpu], float32, K = 1 | 0%" in tables
    assert "swap-in 9.0x eager and 4.0x compile, at least 4.0x compile" in tables
    publish.write(*targets)
    assert [path.read_bytes() for path in written] == first


def test_results_without_a_range_of_classes_have_no_table_of_it() -> None:
    whole, part = loss_result(), loss_result("cuda")
    part["rows"] = [row for row in part["rows"] if row["grid"] == "compared"]
    text = doc_tables.with_tables(
        "<!-- classes: start -->\n<!-- classes: end -->", {"a": {"logit_loss": whole}, "b": {"logit_loss": part}}
    )
    assert text.count("of copy at C =") == 1


def test_the_environment_can_name_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMKD_FAST_COMMIT", "0123456789")
    assert provenance.commit() == "0123456789"


@pytest.mark.parametrize("tests", [RED, UNKNOWN, None])
def test_results_of_a_tree_that_is_not_green_are_refused(
    tmp_path: Path, tests: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = loss_result()
    if tests is None:
        del bad["environment"]["tests"]
    else:
        bad["environment"]["tests"] = tests
    root = place(tmp_path / "results", good=loss_result(), bad=bad)
    text = tmp_path / "README.md"
    text.write_text("kept")
    monkeypatch.setattr(
        "sys.argv", ["publish", "--results", str(root), "--texts", str(text), "--speed-up", str(root / "s.svg")]
    )
    assert publish.main() == 1
    printed = capsys.readouterr().err
    assert f"bad/logit_loss.json: tests {tests or UNKNOWN} at commit abc" in printed and "make test" in printed
    assert (
        not (root / "report.html").exists()
        and text.read_text() == "kept"
        and not [*root.rglob("*.png"), *root.rglob("*.svg")]
    )


def test_publishing_needs_results(tmp_path: Path) -> None:
    with pytest.raises(results.RefusedError, match="no results"):
        results.publishable(tmp_path)


def test_an_unpublished_result_can_be_drawn(tmp_path: Path) -> None:
    path = results.write(tmp_path, "logit_loss", loss_result("cuda", RED))
    figures.main(path)
    assert {p.name for p in tmp_path.glob("*.png")} == {"roofline.png", "speed_up.png", "memory.png"}


def test_every_table_has_a_place() -> None:
    text = doc_tables.PERFORMANCE.read_text()
    for suite in results.SUITES:
        if suite != "small_batch":  # its table is for a GPU, and there are no such results yet
            assert f"<!-- {suite}: start -->" in text and f"<!-- {suite}: end -->" in text
    assert "<!-- classes: start -->" in text and "<!-- headline: start -->" in doc_tables.README.read_text()
    assert "<!-- fashion_mnist: start -->" in doc_tables.TRAINING.read_text()
    assert doc_tables.replaced("nothing", "logit_loss", "table") == "nothing"


def test_committed_results_are_readable() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*/*.json"):
        assert {"environment", "rows"} <= set(json.loads(path.read_text())), path
