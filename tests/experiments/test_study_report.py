"""Conclusions from a study's results; its page and tables depend only on the results."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from statistics import stdev

import pytest

from benchmarks import publish_study as published
from camkd_fast.experiments.study import records, study_report, study_tables
from camkd_fast.experiments.study.cells import Cell
from camkd_fast.experiments.study.findings import (
    Findings,
    bad_teacher_weight,
    bad_teachers_by_class,
    conclusions,
    core_hours,
)
from camkd_fast.experiments.study.paired import Paired, t95
from camkd_fast.experiments.study.records import Results
from camkd_fast.experiments.study.spec import Variant
from tests.support.study_parts import invented

GAINS = (0.01, 0.02, 0.03)  # of seeds 0, 1, 2


def with_gain(sign: float, pools: tuple[str, ...] = ("good", "bad"), scale: float = 1.0) -> Results:
    """CA-MKD is 1, 2 and 3 points above AVER (or below) in the given pools, and equal elsewhere."""

    def accuracy(cell: Cell) -> float:
        gains = cell.variant == "ca-mkd" and cell.pool in pools
        return 0.5 + 0.02 * cell.seed + (sign * scale * GAINS[cell.seed] if gains else 0.0)

    return invented(accuracy)


# --- statistics ------------------------------------------------------------------------------------------------------


def test_an_interval_is_students_t() -> None:
    paired = Paired([1.0, 2.0, 4.0, 3.0, -1.0])
    assert paired.mean == pytest.approx(1.8)
    assert paired.half == pytest.approx(2.776 * stdev([1, 2, 4, 3, -1]) / math.sqrt(5))
    assert (paired.low, paired.high) == (paired.mean - paired.half, paired.mean + paired.half)
    assert paired.outcomes == (4, 0, 1) and Paired([0.0, 1.0]).outcomes == (1, 1, 0)
    assert Paired([1.0]).half == math.inf


def test_the_table_of_t_is_right() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    for freedom in range(1, 31):
        assert t95(freedom) == pytest.approx(scipy_stats.t.ppf(0.975, freedom), abs=5e-4)
    assert t95(1000) == t95(30)
    with pytest.raises(ValueError, match="got 0"):
        t95(0)


# --- findings --------------------------------------------------------------------------------------------------------


def test_differences_are_paired_by_seed_and_averaged_over_places() -> None:
    findings = Findings(with_gain(1.0, pools=("bad",)))
    camkd = findings.results.study.variant("ca-mkd")
    good, bad = findings.places
    assert findings.paired([bad], camkd).differences == pytest.approx([1.0, 2.0, 3.0])  # type: ignore[union-attr]
    assert findings.paired([good, bad], camkd).differences == pytest.approx([0.5, 1.0, 1.5])  # type: ignore[union-attr]
    assert findings.outcomes([good, bad], camkd) == (3, 3, 0)
    assert findings.mean_accuracy([bad], camkd) == pytest.approx(54.0)
    # The ablation is compared with CA-MKD, and only where it was tried.
    uniform = findings.results.study.variant("uniform")
    assert findings.paired([good, bad], uniform).differences == pytest.approx([-1.0, -2.0, -3.0])  # type: ignore[union-attr]
    assert findings.paired([good], uniform) is None and findings.mean_accuracy([good], uniform) is None


def test_a_seed_that_one_place_lacks_is_left_out_of_the_mean() -> None:
    known = with_gain(1.0)
    del known.cells[Cell("bad", "resnet8", "aver", 1)]
    findings = Findings(known)
    camkd = known.study.variant("ca-mkd")
    assert findings.paired(findings.places, camkd).differences == pytest.approx([1.0, 3.0])  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("sign", "verdict", "paper"),
    [
        (1.0, "points over AVER, mean over pools and students: better: CA-MKD (+2.00 ± 2.48)", None),
        (-1.0, "worse: CA-MKD", "less than that in 2 of 2"),
        (0.0, "no clear difference: ", "less than that in 2 of 2"),
    ],
)
def test_the_conclusion_follows_the_numbers_whichever_way_they_fall(
    sign: float, verdict: str, paper: str | None
) -> None:
    # Gains of 1, 2, 3 points have an interval of 2.48 around 2; a third of the spread excludes 0.
    known = with_gain(sign)
    for cell, record in known.cells.items():
        if cell.variant == "ca-mkd" and sign:
            record["test_accuracy"] = 0.5 + 0.02 * cell.seed + sign * (0.02 + (GAINS[cell.seed] - 0.02) / 3)
    said = " ".join(conclusions(Findings(known)))
    assert verdict.partition(" (")[0] in said and "missing" not in said
    if sign > 0:
        assert "CA-MKD (+2.00 ± 0.83)" in said and "worse" not in said
        assert "more than that in 2 of 2 (good, resnet8; bad, resnet8)" in said
    if paper:
        assert paper in said


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_interval_around_0_is_no_difference(sign: float) -> None:
    """Gains of 1, 2 and 3 points: +2.00 ± 2.48, whose mean is on one side of 0 and whose interval is on both."""
    said = " ".join(conclusions(Findings(with_gain(sign))))
    clear = said.partition("Gain from")[0]
    assert f"CA-MKD ({2 * sign:+.2f} ± 2.48)" in clear.partition("no clear difference: ")[2]
    assert "better: " not in clear and "worse: " not in clear


def test_an_interval_around_the_papers_gain_is_compatible_with_it() -> None:
    said = " ".join(conclusions(Findings(with_gain(1.0, scale=0.5))))
    assert "a gain of 0.8 points" in said and "compatible with it in 2 of 2" in said


def test_gain_of_weights_is_separated_from_gain_of_feature_maps() -> None:
    """Feature maps gain 2 points, their weights another 0.25 in bad pools; logit weights gain nothing."""
    study = invented(lambda cell: 0.5).study
    both = (Variant("fitnet-mkd", "fitnet-mkd", label="FitNet-MKD"), Variant("ca-mkd-logits", "ca-mkd-logits"))
    study = replace(study, variants=(*study.variants, *both))

    def accuracy(cell: Cell) -> float:
        weights = 0.0025 if cell.variant == "ca-mkd" and cell.pool == "bad" else 0.0
        return 0.5 + (0.02 if cell.variant in ("ca-mkd", "fitnet-mkd") else 0.0) + weights

    findings = Findings(invented(accuracy, study))
    assert (
        "Gain from the teachers' weights, in points over the same losses with equal weights: "
        "CA-MKD, logits minus AVER +0.00 ± 0.00 with good teachers only, +0.00 ± 0.00 with a bad teacher; "
        "CA-MKD minus FitNet-MKD +0.00 ± 0.00 with good teachers only, +0.25 ± 0.00 with a bad teacher."
    ) in conclusions(findings)
    rows = {row[0]: row[1:] for row in study_tables.difference_by_pool(findings, study.students[0]).rows}
    assert rows["CA-MKD"] == ("+2.00 ± 0.00", "+2.25 ± 0.00")
    assert rows["CA-MKD minus FitNet-MKD"] == ("+0.00 ± 0.00", "+0.25 ± 0.00")
    assert "ca-mkd-logits minus AVER" not in rows, "that is its row over AVER"


def test_without_results_nothing_is_concluded() -> None:
    known = Results(invented(lambda cell: 0.5).study)
    assert conclusions(Findings(known)) == [
        "The study has not been run: all 27 cells are missing, and nothing can be concluded."
    ]
    whole = invented(lambda cell: 0.5)
    known.cells = {cell: record for cell, record in whole.cells.items() if cell.seed == 0}
    said = conclusions(Findings(known))
    assert said[0].startswith("18 of 27 cells are missing") and said[1].startswith("No comparison has two seeds")


def test_the_bad_teachers_weights_are_added_and_averaged_over_seeds() -> None:
    known = invented(lambda cell: 0.5)
    findings = Findings(known)
    camkd = known.study.variant("ca-mkd")
    for seed in (0, 1, 2):
        known.cells[Cell("bad", "resnet8", "ca-mkd", seed)]["weights"] = [[0.5, 0.3, 0.2], [0.9 - 0.3 * seed, 0.0, 0.1]]
    good, bad = findings.places
    assert bad_teacher_weight(findings, bad, camkd, "weights") == pytest.approx([0.5, 0.1])
    assert bad_teacher_weight(findings, good, camkd, "weights") is None


def test_hours_are_those_of_all_cells_by_the_median() -> None:
    known = invented(lambda cell: 0.5)  # 27 cells of 3 seconds
    for record in (*known.teachers.values(), *known.pools.values()):
        record["seconds"] = 100.0
    known.cells[Cell("bad", "resnet8", "aver", 1)]["seconds"] = 5000.0  # interrupted for a while
    assert core_hours(Findings(known)) * 3600 == pytest.approx(27 * 3 + 6 * 100)
    del known.cells[Cell("bad", "resnet8", "aver", 1)]
    assert core_hours(Findings(known)) * 3600 == pytest.approx(27 * 3 + 6 * 100)


# --- tables and page -------------------------------------------------------------------------------------------------


def test_tables_hold_the_numbers() -> None:
    findings = Findings(with_gain(1.0, pools=("bad",)))
    rows = {row[0]: row[1:] for row in study_tables.overview(findings).rows}
    assert list(rows["CA-MKD"]) == [
        *("52.00 %", "+0.00 ± 0.00", "0 / 3 / 0"),
        *("54.00 %", "+2.00 ± 2.48", "3 / 0 / 0"),
    ]
    assert rows["AVER"][1:3] == ["", ""]
    (student,) = findings.results.study.students
    assert study_tables.accuracy_by_pool(findings, student).header == ("", "good", "bad")
    gains = {row[0]: row[1:] for row in study_tables.difference_by_pool(findings, student).rows}
    assert "AVER" not in gains and gains["CA-MKD"] == ("+0.00 ± 0.00", "+2.00 ± 2.48")
    (ablation,) = study_tables.against_others(findings, "ablation").rows
    assert ablation[:5] == ("uniform", "bad, resnet8", "52.00 %", "CA-MKD", "-2.00 ± 2.48")
    # A variant without teachers is in both pools and counts once.
    speeds = {row[0]: row[1] for row in study_tables.cost(findings).rows}
    assert speeds["CE only"] == "1,000"
    assert study_tables.teachers(findings).rows[3][1:3] == ("resnet8", "logits x 4")


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0], ids=["nothing", "a part", "everything"])
def test_equal_results_give_equal_bytes_with_whatever_is_there(tmp_path: Path, share: float) -> None:
    whole = with_gain(1.0)
    known = Results(whole.study)
    if share:
        known.teachers, known.pools = whole.teachers, whole.pools
    kept = list(whole.cells.items())
    known.cells = dict(kept[: round(share * len(kept))])
    known.write(tmp_path / "results.jsonl")
    pages = []
    for name in ("one.html", "two.html"):
        read = records.read(whole.study, tmp_path / "results.jsonl")
        pages.append(study_report.write(read, tmp_path / name).read_bytes())
    assert pages[0] == pages[1]
    page = pages[0].decode()
    assert ("Missing cells" in page) == (share < 1) and "http" not in page
    assert "is at most 1 / (K - 1)" in page and (share > 0 or "<img" not in page)
    if share == 1:
        for words in ("The official code&#x27;s scale", "Ablations", "Weights of bad teachers", "commit 0123456789"):
            assert words in page
        assert page.count('<img alt="') == 5  # quality, weights of logits and features, both by class


def test_weights_of_bad_teachers_by_class() -> None:
    known = invented(lambda cell: 0.5)  # the pool "bad" has good-0, swapped and loud
    known.pools["bad"]["confidence"] = [[0.5] * 10, [0.0, 0.0, *[0.25] * 8], [0.5, 0.5, *[0.25] * 8]]
    for seed, level in enumerate((0.1, 0.2, 0.6)):
        known.cells[Cell("bad", "resnet8", "ca-mkd", seed)]["class_feature_weights"] = [
            [0.4] * 10,
            [level] * 10,
            [0.0] * 10,
        ]
    findings = Findings(known)
    pool = known.study.pool("bad")
    swapped, loud = (pool, "swapped"), (pool, "loud")
    found = bad_teachers_by_class(findings)
    assert found["logits"] == {swapped: [0.0, 0.0, *[0.25] * 8], loud: [0.5, 0.5, *[0.25] * 8]}
    assert found["features"] == {swapped: pytest.approx([0.3] * 10), loud: [0.0] * 10}
    table = study_tables.by_class(findings, "logits")
    assert table.header[:3] == ("bad teacher", "equal share", "class 0") and len(table.header) == 12
    assert table.rows[0][:4] == ("bad: classes 0 and 1 swapped", "0.33", "0.00", "0.00")


def test_markdown_shows_every_table() -> None:
    findings = Findings(with_gain(1.0))
    text = published.evidence(findings)
    assert len(re.findall(r"^\| --- ", text, re.MULTILINE)) == 11 and "a processor; commit 0123456789.\n" in text


def test_students_without_a_pool_are_not_expected_there() -> None:
    known = invented(lambda cell: 0.5)
    (student,) = known.study.students
    other = replace(student, model="vgg8", pools=("bad",))
    findings = Findings(Results(replace(known.study, students=(student, other))))
    assert [(pool.name, who.model) for pool, who in findings.places] == [
        ("good", "resnet8"),
        ("bad", "resnet8"),
        ("bad", "vgg8"),
    ]
