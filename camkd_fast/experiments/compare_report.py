"""Output of a comparison: a table, compare.json and report.html."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from ..report.page import Part, Picture, Section, Table, rate, write_page
from ..report.plots import Curve, Panel, Sample, accuracy_bars, curves, differences
from ..train.atomic import write_atomically
from ..train.journal import METRICS, read_metrics
from ..train.run_folder import REPORT
from ..train.source_strings import labels
from ..train.strategies import find
from .compare import BASELINE, CompareConfig, Row, as_json, baseline, spread
from .run_report import footer, settings

COMPARE = "compare.json"
_PALE = "#b9c0c8"  # of teachers: every other colour is a strategy's


def student_table(rows: Sequence[Row]) -> Table:
    """Mean, deviation and every seed of each strategy, and the paired difference to the baseline."""
    aver = baseline(rows)
    lines = []
    for row in rows:
        cells = [
            find(row.strategy).label,
            f"{100 * row.mean:.2f} %",
            f"{100 * row.spread:.2f}" if len(row.test_accuracy) > 1 else "",
            ", ".join(f"{100 * accuracy:.1f}" for accuracy in row.test_accuracy),
        ]
        if aver is not None:
            gains = [100 * gain for gain in row.gains(aver)]
            gain = f"{mean(gains):+.2f}" + (f" ± {spread(gains):.2f}" if len(gains) > 1 else "")
            cells.append("" if row is aver else gain)
        lines.append((*cells, rate(row.images_per_second)))
    difference = [] if aver is None else [f"over {find(BASELINE).label}, paired"]
    return Table(("student", "test accuracy", "deviation", "each seed", *difference, "images/s"), lines)


def student_samples(rows: Sequence[Row]) -> list[Sample]:
    return [Sample(find(r.strategy).label, find(r.strategy).color, [100 * a for a in r.test_accuracy]) for r in rows]


def student_curves(rows: Sequence[Row]) -> list[Curve]:
    """Validation accuracy in percent by epoch; the runs of a strategy form a band."""
    lines = []
    for row in rows:
        validated = [[r for r in epochs if "validation_accuracy" in r] for epochs in row.epochs]
        runs = [[100 * record["validation_accuracy"] for record in records] for records in validated]
        if runs[0]:
            x = [record["epoch"] for record in validated[0]]
            lines.append(Curve(find(row.strategy).label, find(row.strategy).color, runs, x=x))
    return lines


def difference_plot(rows: Sequence[Row]) -> Picture | None:
    """Each strategy's gain over the baseline, per seed; None without a baseline or another strategy."""
    aver = baseline(rows)
    if aver is None or len(rows) == 1:
        return None
    samples = [
        Sample(find(row.strategy).label, find(row.strategy).color, [100 * gain for gain in row.gains(aver)])
        for row in rows
        if row is not aver
    ]
    return differences(
        samples,
        f"Difference to {find(BASELINE).label} from the same seed",
        "test accuracy (points): each seed, their mean",
    )


def _sections(config: CompareConfig, rows: Sequence[Row]) -> list[Section]:
    teachers = config.student.teachers
    files = [(name, Path(teacher) / METRICS) for name, teacher in zip(labels(teachers), teachers, strict=True)]
    tests = [(name, read_metrics(file, "test")) for name, file in files if file.exists()]  # of run folders
    known = [(name, records[-1]["test_accuracy"]) for name, records in tests if records]
    groups = [[Sample(name, _PALE, [100 * accuracy]) for name, accuracy in known]] if known else []
    parts: list[Part] = [accuracy_bars([*groups, student_samples(rows)], "Students, enlarged"), student_table(rows)]
    gains = difference_plot(rows)
    if gains is not None:
        parts.insert(1, gains)
    sections = [
        Section(
            "Test accuracy",
            "Test accuracy of the last epoch; no epoch is selected. Deviations are sample standard deviations over "
            "seeds. Equal seeds share initial parameters and image order, so differences are paired by seed.",
            parts,
        )
    ]
    lines = student_curves(rows)
    if lines:
        panel = Panel("Students", "validation accuracy (%)", lines)
        text = "Validation accuracy after each epoch, mean over seeds."
        sections.append(Section("Training", text, [curves([panel])]))
    return [*sections, settings(config.student, "Common settings of all runs that differ from the defaults.")]


def write(config: CompareConfig, rows: Sequence[Row], environment: Mapping[str, str]) -> Path:
    """Write compare.json and report.html into the existing folder `config.out`; return the page's path."""
    content = {"environment": dict(environment), **as_json(config, rows)}
    write_atomically(config.out / COMPARE, (json.dumps(content, indent=1, default=str) + "\n").encode())
    page, student = config.out / REPORT, config.student
    lead = (
        f"{len(rows)} strategies from {len(config.seeds)} seeds, {student.optim.epochs} epochs each. "
        f"Teachers: {', '.join(map(str, student.teachers)) or 'none'}."
    )
    title = f"{student.student} on {student.data.data}: strategies compared"
    write_page(page, title, lead, _sections(config, rows), footer(environment))
    return page
