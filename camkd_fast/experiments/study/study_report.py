"""The page of a study, from its settings and results alone: equal results give equal bytes."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from ...report.page import Figures, Folded, Part, Picture, Points, Section, Table, write_page
from ...report.plots import TEACHER_COLORS, Curve, Panel, class_levels, curves
from ...train.strategies import find
from . import cells, study_tables
from .findings import Findings, bad_teacher_weight, bad_teachers_by_class, conclusions, core_hours, how_bad, label
from .records import Results
from .spec import Pool


def write(results: Results, page: Path) -> Path:
    """Write the page and return its path."""
    findings = Findings(results)
    sections = [
        _conclusion(findings),
        _accuracy(findings),
        *_variants(findings),
        *_quality(findings),
        *_weights(findings),
        _helpless(),
        _calibration(findings),
        _cost(findings),
        _teachers(findings),
    ]
    study = results.study
    data = study.data
    lead = (
        f"{len(study.variants)} variants, {len(study.pools)} pools of teachers, {len(study.students)} students, "
        f"{len(study.seeds)} seeds on {data.data}: {data.images or 'all'} training images, {study.training.epochs} "
        f"epochs. Test accuracy of the last epoch; no epoch is selected."
    )
    write_page(page, study.title, lead, sections, results.origin or "No results yet.")
    return page


def _conclusion(findings: Findings) -> Section:
    missing = findings.results.missing
    done = len(findings.results.cells)
    parts: list[Part] = [
        Points(conclusions(findings)),
        Figures({"cells finished": f"{done:,}", "cells missing": f"{len(missing):,}"}),
    ]
    if missing:
        rows = [(cell.pool, cell.student, cell.variant, str(cell.seed)) for cell in missing]
        parts.append(Folded("Missing cells", Table(("pool", "student", "variant", "seed"), rows)))
    rule = (
        "An interval is that of the mean over seeds, 95 %, from Student's t; a strategy counts as better or worse "
        "where its interval leaves out 0. Nothing is corrected for the number of comparisons."
    )
    return Section("What was found", rule, parts)


def _accuracy(findings: Findings) -> Section:
    parts: list[Part] = [study_tables.overview(findings)]
    for student in findings.results.study.students:
        accuracies = study_tables.accuracy_by_pool(findings, student)
        gains = study_tables.difference_by_pool(findings, student)
        parts.append(Folded(f"{student.model}, test accuracy (%)", accuracies))
        parts.append(Folded(f"{student.model}, difference in points", gains))
    text = (
        "Mean over pools, students and seeds; differences to AVER from the same seed, with 95 % intervals. All "
        "strategies have the same total strength and, per seed, the same first parameters, image order and "
        "augmentation. Every teacher is asked through the cache, which makes the study possible and equal for all, "
        "so the feature losses compare maps averaged over height and width rather than the maps of the paper."
    )
    return Section("Test accuracy", text, parts)


def _variants(findings: Findings) -> list[Section]:
    texts = {
        "official": (
            "The official code's scale",
            "Both losses divided by the number of teachers once more where the official code does so, which makes the "
            "total strength differ by strategy.",
        ),
        "ablation": ("Ablations", "One thing changed, each beside the variant that it is to be compared with."),
    }
    return [
        Section(title, text, [study_tables.against_others(findings, table)])
        for table, (title, text) in texts.items()
        if findings.variants(table)
    ]


def _quality(findings: Findings) -> list[Section]:
    """Students over the accuracy of their pool's teachers."""
    known = findings.results.teachers
    panels = []
    for student in findings.results.study.students:
        lines = []
        for variant in findings.variants("main"):
            points = []
            for place in findings.places:
                accuracy = findings.mean_accuracy([place], variant)
                if place[1] == student and accuracy is not None and all(name in known for name in place[0].teachers):
                    teachers = mean(100 * known[name]["test_accuracy"] for name in place[0].teachers)
                    points.append((teachers, accuracy))
            if len(points) > 1:
                x, y = zip(*sorted(points), strict=True)
                lines.append(Curve(label(variant), find(variant.strategy).color, [y], x=x))
        if lines:
            panels.append(
                Panel(student.model, "student, test (%)", lines, xlabel="teachers of the pool, mean, test (%)")
            )
    if not panels:
        return []
    text = "Each point is a pool: the mean accuracy of its teachers, and of students that learnt from them."
    return [Section("Students and the quality of teachers", text, [curves([panel]) for panel in panels])]


def _weights(findings: Findings) -> list[Section]:
    """What the bad teachers of each pool get: over training, and class by class."""
    study = findings.results.study
    parts: list[Part] = []
    bad_pools = [pool for pool in study.pools if study.bad(pool)]
    for student in study.students:
        panels = []
        for of, kind in (("weights", "logits"), ("feature_weights", "features")):
            lines = [line for pool in bad_pools for line in _over_training(findings, pool, student.model, of)]
            if lines:
                panels.append(Panel(f"{student.model}, {kind}", "weight of the bad", lines, from_zero=True))
        parts += [curves([panel]) for panel in panels]
    parts += _by_class(findings)
    if not parts:
        return []
    text = (
        "Weight that CA-MKD gives to the bad teachers of a pool together, mean over images and seeds; equal weights "
        "would be their share of the pool. By class: the weight on logits follows from teachers and labels alone; "
        "that on features is of students after the last epoch. A row names the pool and how its bad teacher is bad."
    )
    return [Section("Weights of bad teachers", text, parts)]


def _over_training(findings: Findings, pool: Pool, model: str, of: str) -> list[Curve]:
    color = TEACHER_COLORS[findings.results.study.pools.index(pool) % len(TEACHER_COLORS)]
    found = []
    for variant in findings.confident():
        for place in findings.places:
            if place[0] == pool and place[1].model == model:
                weights = bad_teacher_weight(findings, place, variant, of)
                if weights:
                    found.append(Curve(pool.name, color, [weights]))
    return found


def _by_class(findings: Findings) -> list[Picture]:
    """Heat maps of (bad teacher of a pool) x class."""
    pictures = []
    for kind, weights in bad_teachers_by_class(findings).items():
        if weights:
            names = [how_bad(findings, *teacher) for teacher in weights]
            levels = list(weights.values())
            words = f"Mean weight on {kind} of bad teachers by class: " + "; ".join(
                f"{name}: {min(row):.2f} to {max(row):.2f}" for name, row in zip(names, levels, strict=True)
            )
            rows = [f"{name} ({kind})" for name in names]
            pictures.append(class_levels(rows, levels, words, max(map(max, levels)), percent=False))
    return pictures


def _helpless() -> Section:
    text = (
        "The weight w_k = (1 - softmax_k(CE_k)) / (K - 1) is at most 1 / (K - 1): it takes its say away from the worst "
        "teacher of a sample, but never gives more than that bound to the best. So (1) where several teachers are bad "
        "in the same samples the worst alone is left out: of two whose cross-entropies differ clearly the lesser evil "
        "counts as much as a good teacher, of two that are alike each counts half as much; (2) with large K the bound "
        "is near the equal weight 1 / K, whatever the teachers say; (3) it looks at the probability of the label "
        "alone: a teacher that is right and over-confident has the least cross-entropy and so the most weight, "
        "although its other probabilities, which are what distillation adds to labels, say least; (4) where teachers "
        "give the label the same probability their weights are equal, and CA-MKD is AVER; (5) on logits it depends on "
        "teachers and labels and not on the student, so it cannot know what a student has yet to learn. It can help "
        "where teachers differ in which samples they get wrong: one that was taught swapped classes can be left out "
        "there and kept elsewhere."
    )
    return Section("When a label-aware weight cannot help", text, [])


def _calibration(findings: Findings) -> Section:
    text = "Expected calibration error on the test images, 15 bins, mean over pools, students and seeds."
    return Section("Calibration of students", text, [study_tables.calibration(findings)])


def _cost(findings: Findings) -> Section:
    text = (
        "Training steps of one process with one thread, evaluation apart, teachers from the cache; other processes of "
        "the study ran beside it, and at times other work, which is why these are medians. By them teachers, caches "
        f"and all cells together are {core_hours(findings):.1f} hours of one core."
    )
    return Section("Cost", text, [study_tables.cost(findings)])


def _teachers(findings: Findings) -> Section:
    study = findings.results.study
    text = (
        "Teachers learn from the whole training part; a bad one is bad on purpose. `best teacher` in the tables is the "
        "one of the pool with the highest validation accuracy. Total number of runs: "
        f"{len(cells.cells(study)):,} students."
    )
    return Section("Teachers and pools", text, [study_tables.teachers(findings), study_tables.pools(findings)])
