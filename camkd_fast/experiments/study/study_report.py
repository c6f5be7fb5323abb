"""The page of a study, generated only from its settings and results: equal results give equal bytes."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from ...report.page import Figures, Folded, Part, Picture, Points, Section, Table, write_page
from ...report.plots import TEACHER_COLORS, Curve, Panel, class_levels, curves
from ...train.strategies import find
from . import cells, study_tables
from .findings import Findings, bad_teacher_weight, bad_teachers_by_class, badness_of, conclusions, core_hours, label
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
        _limits(),
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
        "Intervals are 95 % intervals of the mean over seeds, from Student's t. A strategy counts as better or worse "
        "if its interval excludes 0. There is no correction for multiple comparisons."
    )
    return Section("Conclusions", rule, parts)


def _accuracy(findings: Findings) -> Section:
    parts: list[Part] = [study_tables.overview(findings)]
    for student in findings.results.study.students:
        accuracies = study_tables.accuracy_by_pool(findings, student)
        gains = study_tables.difference_by_pool(findings, student)
        parts.append(Folded(f"{student.model}, test accuracy (%)", accuracies))
        parts.append(Folded(f"{student.model}, difference in points", gains))
    text = (
        "Mean over pools, students and seeds; differences to AVER from the same seed, with 95 % intervals. All "
        "strategies have the same total strength and, per seed, the same initial parameters, image order and "
        "augmentation. All teachers are replayed from a cache, so the feature losses compare maps averaged over height "
        "and width, unlike in the paper."
    )
    return Section("Test accuracy", text, parts)


def _variants(findings: Findings) -> list[Section]:
    texts = {
        "official": (
            "The official code's scale",
            "Both losses are divided by the number of teachers once more wherever the official code does so; the total "
            "strength then differs between strategies.",
        ),
        "ablation": ("Ablations", "One setting changed, compared with the unchanged variant."),
    }
    return [
        Section(title, text, [study_tables.against_others(findings, table)])
        for table, (title, text) in texts.items()
        if findings.variants(table)
    ]


def _quality(findings: Findings) -> list[Section]:
    """Accuracy of students against the mean accuracy of their teachers."""
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
    text = "Each point is a pool: mean accuracy of its teachers and of the students distilled from them."
    return [Section("Students and the quality of teachers", text, [curves([panel]) for panel in panels])]


def _weights(findings: Findings) -> list[Section]:
    """Weights of the bad teachers of each pool: over training, and by class."""
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
        "Summed weight of a pool's bad teachers in CA-MKD, mean over images and seeds; with equal weights it would be "
        "their fraction of the pool. By class: logit weights depend only on teachers and labels; feature weights are "
        "those of students after the last epoch. Rows are labelled with the pool and the defect of its bad teacher."
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
            names = [badness_of(findings, *teacher) for teacher in weights]
            levels = list(weights.values())
            words = f"Mean weight on {kind} of bad teachers by class: " + "; ".join(
                f"{name}: {min(row):.2f} to {max(row):.2f}" for name, row in zip(names, levels, strict=True)
            )
            rows = [f"{name} ({kind})" for name in names]
            pictures.append(class_levels(rows, levels, words, max(map(max, levels)), percent=False))
    return pictures


def _limits() -> Section:
    text = (
        "The weight w_k = (1 - softmax_k(CE_k)) / (K - 1) is at most 1 / (K - 1): it suppresses the worst teacher of "
        "a sample, but the best teacher never exceeds this bound. Therefore: (1) If several teachers are wrong on the "
        "same samples, only the worst is suppressed: of two with clearly different cross-entropies the better one "
        "weighs as much as a good teacher; of two with equal ones each weighs half as much. (2) With large K the bound "
        "approaches the equal weight 1 / K. (3) Only the probability of the label matters: an over-confident correct "
        "teacher has the lowest cross-entropy and the largest weight, although its other probabilities, which are the "
        "gain of distillation over labels, carry the least information. (4) If all teachers give the label the same "
        "probability, their weights are equal and CA-MKD is AVER. (5) Logit weights depend on teachers and labels, not "
        "on the student. The weights can help if teachers are wrong on different samples: one that was trained with "
        "two swapped classes can be suppressed on these classes and used on the others."
    )
    return Section("When a label-aware weight cannot help", text, [])


def _calibration(findings: Findings) -> Section:
    text = "Expected calibration error on the test images, 15 bins, mean over pools, students and seeds."
    return Section("Calibration of students", text, [study_tables.calibration(findings)])


def _cost(findings: Findings) -> Section:
    text = (
        "Training steps of one process with one thread, without evaluation, teachers from the cache. Values are "
        "medians, because other processes of the study and at times other work ran on the machine. At these medians, "
        f"teachers, caches and all cells take {core_hours(findings):.1f} hours of one core."
    )
    return Section("Cost", text, [study_tables.cost(findings)])


def _teachers(findings: Findings) -> Section:
    study = findings.results.study
    text = (
        "Teachers are trained on the whole training part; bad ones are deliberately bad. `best teacher` in the tables "
        "is the teacher of the pool with the highest validation accuracy. Total number of runs: "
        f"{len(cells.cells(study)):,} students."
    )
    return Section("Teachers and pools", text, [study_tables.teachers(findings), study_tables.pools(findings)])
