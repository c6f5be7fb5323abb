"""The committed results of the study, and the texts generated from them."""

from __future__ import annotations

from statistics import mean

from benchmarks import doc_tables, publish_study
from camkd_fast.experiments.study import records, spec
from camkd_fast.experiments.study.findings import Findings, Place, bad_teachers_by_class, interval
from camkd_fast.experiments.study.paired import Paired
from camkd_fast.experiments.study.records import Results


def committed(study: str, lines: str) -> Results:
    return records.read(spec.load(publish_study.FOLDER / f"{study}.yaml"), publish_study.FOLDER / f"{lines}.jsonl")


def test_committed_tables_are_those_of_the_committed_results() -> None:
    known = committed("study", "results")
    findings = Findings(known)
    text = publish_study.STRATEGIES.read_text()
    written = doc_tables.replaced(text, "evidence", publish_study.evidence(findings))
    assert written == text, "`make study-report` changes docs/strategies.md"
    assert (publish_study.FOLDER / "report.html").exists()


def test_the_advice_follows_from_the_committed_results() -> None:
    """Every claim of "In short" and its numbers must follow from the results."""
    known = committed("study", "results")
    assert known.missing == []
    findings = Findings(known)
    text = " ".join(
        publish_study.STRATEGIES.read_text().partition("## In short")[2].partition("## Evidence")[0].split()
    )
    groups = findings.groups()
    good, bad = groups["good teachers only"], groups["a bad teacher"]
    variants = {variant.name: variant for variant in findings.variants("main")}

    def paired(places: list[Place], name: str, said: bool = True) -> Paired:
        found = findings.paired(places, variants[name])
        assert found is not None and len(found.differences) == 5
        assert not said or interval(found) in text, f"{name}: {interval(found)} is not what the text says"
        return found

    def accuracy(place: Place, name: str) -> float:
        found = findings.mean_accuracy([place], variants[name])
        assert found is not None
        return found

    assert all(paired(places, name).low > 0 for places in (good, bad) for name in ("ca-mkd", "fitnet-mkd"))
    for pair in findings.weighed():
        for places in (good, bad):
            gain = findings.paired(places, *pair)
            assert gain is not None and gain.low < 0 < gain.high
    for place in findings.places:
        if place[1].model == "mobilenetv2":
            for name in ("ca-mkd", "fitnet-mkd"):
                assert paired([place], name, said=False).low < 0
    assert paired(bad, "best").low > 0 and paired(bad, "aekd").high < 0
    assert all(
        paired(places, "ebkd", said=False).low < 0 < paired(places, "ebkd", said=False).high for places in (good, bad)
    )
    assert all(paired(places, "ce", said=False).high < -2 for places in (good, bad))
    here = {(pool.name, student.model): (pool, student) for pool, student in findings.places}
    assert paired([here["bad-loud", "resnet8"]], "ebkd").high < 0
    two_bad = here["two-bad", "resnet8"]
    combined = max(accuracy(two_bad, name) for name in variants if name != "best")
    assert accuracy(two_bad, "best") > combined + 1
    assert f"{accuracy(two_bad, 'best'):.2f} % for resnet8, the others {combined:.2f} % at most" in text

    attached = known.study.variant("attached")
    for pool in ("good-equal", "bad-wrong-80"):
        cost = findings.paired([here[pool, "resnet8"]], attached)
        assert cost is not None and cost.high < 0 and interval(cost).removeprefix("-") in text

    found = bad_teachers_by_class(findings)["logits"].items()
    logits = {(pool.name, teacher): weights for (pool, teacher), weights in found}
    wrong, swapped = logits["five-mixed", "wrong-80"], logits["bad-swapped", "swapped"]
    assert {round(weight, 2) for c, weight in enumerate(wrong) if c not in (1, 8)} <= {0.1, 0.11}
    assert {round(wrong[c], 2) for c in (1, 8)} == {0.25} and {round(swapped[c], 2) for c in (1, 8)} == {0.0}
    assert min(logits["two-bad", "few"]) > 1 / 3
    assert all(abs(weight - 1 / 3) < 0.04 for weight in logits["bad-loud", "loud"])
    assert all(abs(weight - 1 / 3) < 0.01 for c, weight in enumerate(swapped) if c not in (1, 8))


def test_the_students_betas_are_the_best_on_held_out_images() -> None:
    chosen = committed("beta", "beta")
    assert chosen.missing == []
    study = spec.load(publish_study.FOLDER / "study.yaml")
    for student in study.students:
        means = {
            variant.beta: mean(
                record["validation_accuracy"][-1]
                for cell, record in chosen.cells.items()
                if (cell.student, cell.variant) == (student.model, variant.name)
            )
            for variant in chosen.study.variants
            if variant.beta is not None
        }
        beta = study.variant("ca-mkd").beta if student.beta is None else student.beta
        assert max(means, key=lambda b: means[b]) == beta, f"{student.model}: {means}"
