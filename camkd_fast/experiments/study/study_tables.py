"""Findings as tables, for the page, the README and the documentation."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from ...report.page import Table, rate
from .findings import Findings, Place, bad_teachers_by_class, badness_of, difference, interval, label, mean_over
from .spec import Student, Variant
from .work import Record

NOTHING = "-"  # for missing results


def overview(findings: Findings) -> Table:
    """Each variant of the main table over all pools with good teachers only, and over those with a bad one."""
    groups = findings.groups()
    header = ["strategy"]
    for name in groups:
        header += [f"{name}: accuracy", "difference", "wins / ties / losses"]
    rows = []
    for variant in findings.variants("main"):
        cells = [label(variant)]
        for places in groups.values():
            accuracy = findings.mean_accuracy(places, variant)
            cells += [NOTHING if accuracy is None else f"{accuracy:.2f} %", *_gain(findings, places, variant)]
        rows.append(cells)
    return Table(header, rows)


def _gain(findings: Findings, places: Sequence[Place], variant: Variant) -> tuple[str, str]:
    if variant.name == variant.against:
        return "", ""
    paired = findings.paired(places, variant)
    if paired is None:
        return NOTHING, NOTHING
    return interval(paired), " / ".join(map(str, findings.outcomes(places, variant)))


def accuracy_by_pool(findings: Findings, student: Student) -> Table:
    """Mean test accuracy of a student in percent: variants of the main table x pools."""
    places = _places_of(findings, student)
    rows = []
    for variant in findings.variants("main"):
        found = [findings.mean_accuracy([place], variant) for place in places]
        rows.append((label(variant), *(NOTHING if accuracy is None else f"{accuracy:.2f}" for accuracy in found)))
    return Table(("", *(place[0].name for place in places)), rows)


def difference_by_pool(findings: Findings, student: Student) -> Table:
    """Points over the reference of each main-table variant x pools; the last rows give the gain from weights."""
    study, places = findings.results.study, _places_of(findings, student)
    variants = [variant for variant in findings.variants("main") if variant.name != variant.against]
    compared = [(label(variant), variant, study.variant(variant.against)) for variant in variants]
    compared += [(difference(*pair), *pair) for pair in findings.weighed() if pair[0].against != pair[1].name]
    rows = []
    for name, variant, other in compared:
        pairs = [findings.paired([place], variant, other) for place in places]
        rows.append((name, *(NOTHING if paired is None else interval(paired) for paired in pairs)))
    return Table(("", *(place[0].name for place in places)), rows)


def _places_of(findings: Findings, student: Student) -> list[Place]:
    return [place for place in findings.places if place[1] == student]


def against_others(findings: Findings, table: str) -> Table:
    """The variants of a table at each of their places, with their references."""
    rows = []
    for variant in findings.variants(table):
        other = findings.results.study.variant(variant.against)
        for place in findings.places:
            if not findings.has(place, variant):
                continue
            accuracy = findings.mean_accuracy([place], variant)
            where = f"{place[0].name}, {place[1].model}"
            written = NOTHING if accuracy is None else f"{accuracy:.2f} %"
            rows.append((label(variant), where, written, label(other), *_gain(findings, [place], variant)))
    return Table(("variant", "where", "accuracy", "compared with", "difference", "wins / ties / losses"), rows)


def teachers(findings: Findings) -> Table:
    rows = []
    study = findings.results.study
    for spec in study.teachers:
        record = findings.results.teachers.get(spec.name)
        numbers = [NOTHING] * 4
        if record is not None:
            numbers = [
                f"{record['parameters']:,}",
                f"{100 * record['validation_accuracy']:.2f} %",
                f"{100 * record['test_accuracy']:.2f} %",
                f"{100 * record['test_calibration']:.1f} %",
            ]
        model = spec.model or study.teacher(spec.source).model
        rows.append((spec.name, model, spec.badness or "good", *numbers))
    return Table(("teacher", "model", "", "parameters", "validation", "test accuracy", "test ECE"), rows)


def pools(findings: Findings) -> Table:
    return Table(
        ("pool", "", "teachers"),
        [(pool.name, pool.label, ", ".join(pool.teachers)) for pool in findings.results.study.pools],
    )


def by_class(findings: Findings, kind: str) -> Table:
    """CA-MKD's mean weight of each bad teacher on `kind` ("logits", "features"), by class."""
    weights = bad_teachers_by_class(findings)[kind]
    C = max(map(len, weights.values()), default=0)
    rows = [
        (badness_of(findings, pool, teacher), f"{1 / len(pool.teachers):.2f}", *(f"{weight:.2f}" for weight in row))
        for (pool, teacher), row in weights.items()
    ]
    return Table(("bad teacher", "equal share", *(f"class {c}" for c in range(C))), rows)


def calibration(findings: Findings) -> Table:
    """ECE of students on the test images in percent, by variant and group; means over places and seeds."""
    groups = findings.groups()
    rows = []
    for variant in findings.variants("main"):
        cells = []
        for places in groups.values():
            records = _records(findings, places, variant)
            error = mean_over(records, "test_calibration")
            cells.append(NOTHING if error is None else f"{100 * error:.2f} %")
        rows.append((label(variant), *cells))
    return Table(("strategy", *groups), rows)


def cost(findings: Findings) -> Table:
    """Images per second of one process and seconds per epoch, by variant and student.

    Medians over pools and seeds, since some runs shared the machine with other work.
    """
    study = findings.results.study
    header, rows = ["strategy"], []
    for student in study.students:
        header += [f"{student.model}: images/s", "s per epoch"]
    for variant in findings.variants("main"):
        cells = []
        for student in study.students:
            records = _records(findings, _places_of(findings, student), variant)
            speeds = [record["images_per_second"] for record in records]
            speeds = [speed for speed in speeds if speed > 0]
            images = study.data.images
            cells.append(rate(median(speeds)) if speeds else NOTHING)
            cells.append(f"{images / median(speeds):.1f}" if speeds and images else NOTHING)
        rows.append((label(variant), *cells))
    return Table(header, rows)


def _records(findings: Findings, places: Sequence[Place], variant: Variant) -> list[Record]:
    """Records of all finished cells at these places; a run that belongs to several pools counts once."""
    found = [record for place in places for record in findings.records(place, variant).values()]
    return list({id(record): record for record in found}.values())
