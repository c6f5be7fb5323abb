"""What the demonstration prints and writes: tables, report.html and metrics.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import mean

from ..report.page import Section, Table, write_page
from ..report.plots import TEACHER_COLORS, Curve, Panel, Sample, accuracy_bars, curves, weight_histograms
from ..train.strategies import AVER, CAMKD, find
from .compare import Row, spread
from .compare_report import student_curves, student_samples, student_table
from .demo import DemoResults
from .loss_speed import LossSpeed
from .run_report import footer


def teacher_table(results: DemoResults) -> Table:
    rows = []
    for teacher, weights in zip(results.teachers, results.weights, strict=True):
        spec = teacher.spec
        rows.append(
            (
                f"{spec.name} ({spec.model})",
                f"{spec.images or results.sizes[0]}",
                f"{100 * spec.wrong_labels:.0f} %",
                f"{100 * teacher.test_accuracy:.1f} %",
                f"{weights.mean().item():.3f}",
                f"{teacher.images_per_second:,.0f}",
            )
        )
    return Table(("teacher", "trained on", "wrong labels", "test accuracy", "mean weight", "images/s"), rows)


def speed_table(speed: LossSpeed) -> Table:
    rows = [
        (name, f"{milliseconds:.2f} ms", f"{milliseconds / speed.milliseconds['fused']:.1f}x")
        for name, milliseconds in sorted(speed.milliseconds.items(), key=lambda item: item[1])
    ]
    return Table(("loss, forward + backward", "median", "time relative to fused"), rows)


def _setting(results: DemoResults) -> str:
    config, (train, validation, test) = results.config, results.sizes
    return (
        f"scikit-learn's handwritten digits, 8x8 pixels. Teachers learn from up to {train} labelled images; every "
        f"student, a {config.student}, from {config.student_images} of them for {config.student_epochs} epochs, so "
        f"that there is something to gain. {validation} images served to choose settings, {test} test images give "
        "the accuracies below. Training runs on one thread."
    )


def _verdict(results: DemoResults) -> str:
    """The comparison with AVER as it came out, whichever way."""
    camkd, aver = _row(results, CAMKD.name), _row(results, AVER.name)
    gains = [100 * gain for gain in camkd.gains(aver)]
    gain = mean(gains)
    poor, weight = min(zip(results.teachers, results.weights.mean(1).tolist(), strict=True), key=lambda pair: pair[1])
    outcome = f"{abs(gain):.1f} points {'above' if gain > 0 else 'below'}" if round(gain, 1) else "level with"
    return (
        f"CA-MKD ends {outcome} AVER in the mean over {len(gains)} seeds, whose differences deviate by "
        f"{spread(gains):.1f}; it gives the {poor.spec.name} a mean weight of {weight:.2f} where AVER gives "
        f"{1 / len(results.teachers):.2f}."
    )


def _row(results: DemoResults, strategy: str) -> Row:
    return next(row for row in results.students if row.strategy == strategy)


def _speed_note(speed: LossSpeed) -> str:
    contenders = "eager PyTorch"
    if speed.compile_seconds is not None:
        contenders += f" and torch.compile, which took {speed.compile_seconds:.0f} s to compile"
    return (
        f"{speed.rows} x {speed.classes} logits, {speed.teachers} teachers, float32; the same formulas in {contenders}."
        f" {speed.note}"
    ).rstrip()


def summary(results: DemoResults) -> str:
    """The tables for a terminal."""
    return "\n\n".join(
        [
            _setting(results),
            teacher_table(results).text(),
            student_table(results.students).text(),
            _verdict(results),
            _speed_note(results.speed),
            speed_table(results.speed).text(),
        ]
    )


def _histogram_note(results: DemoResults) -> str:
    config = results.config
    poor = max(config.teachers, key=lambda spec: spec.wrong_labels)
    return (
        f"The confidence weight of each teacher on the {config.student_images} images that the students learn from. "
        f"The {poor.name} learned {poor.images or results.sizes[0]} images, these among them, with "
        f"{100 * poor.wrong_labels:.0f} % of the labels wrong. Where all agree with the label each weighs 1/3; where "
        "one is sure of another class it loses its weight and the other two share it, 1/2 each."
    )


def _weight_curves(results: DemoResults) -> list[Curve]:
    runs = _row(results, CAMKD.name).epochs
    lines = []
    for of, kind in (("weights", "logits"), ("feature_weights", "features")):
        for k, (teacher, color) in enumerate(zip(results.teachers, TEACHER_COLORS, strict=False)):
            series = [[record[of][k] for record in epochs] for epochs in runs]
            lines.append(Curve(f"{teacher.spec.name}, {kind}", color, series, dashed=kind == "features"))
    return lines


def _sections(results: DemoResults) -> list[Section]:
    names = [teacher.spec.name for teacher in results.teachers]
    teachers = [
        Sample(name, color, [100 * teacher.test_accuracy])
        for name, teacher, color in zip(names, results.teachers, TEACHER_COLORS, strict=False)
    ]
    teacher_curves = [
        Curve(name, color, [[100 * record["validation_accuracy"] for record in teacher.epochs]])
        for name, teacher, color in zip(names, results.teachers, TEACHER_COLORS, strict=False)
    ]
    weights = [
        Sample(name, color, row.tolist())
        for name, row, color in zip(names, results.weights, TEACHER_COLORS, strict=False)
    ]
    panels = (
        Panel("Students", "validation accuracy (%)", student_curves(results.students)),
        Panel("Teachers", "validation accuracy (%)", teacher_curves),
    )
    return [
        Section(
            "Accuracy on test images",
            _verdict(results),
            (
                accuracy_bars((teachers, student_samples(results.students)), "Students, enlarged"),
                teacher_table(results),
                student_table(results.students),
            ),
        ),
        Section("Whom CA-MKD believes", _histogram_note(results), (weight_histograms(weights),)),
        Section(
            "Training",
            "Validation accuracy after each epoch, students as mean and range over seeds. No epoch is selected: the "
            "last one counts.",
            (curves(panels),),
        ),
        Section(
            "Weights during CA-MKD training",
            "The logit weights depend on teachers and labels only and stay level. The feature weights judge how well "
            "each teacher's own classifier reads the student's features, so they move as the student learns.",
            (curves((Panel("Mean weight per teacher", "mean weight", _weight_curves(results)),)),),
        ),
        Section("Speed of the loss", _speed_note(results.speed), (speed_table(results.speed),)),
    ]


def metrics(results: DemoResults, environment: Mapping[str, str]) -> dict[str, object]:
    """Everything measured, ready for JSON."""
    return {
        "environment": dict(environment),
        "config": asdict(results.config),
        "images": dict(zip(("train", "validation", "test"), results.sizes, strict=True)),
        "teachers": [
            {
                **asdict(t.spec),
                "test_accuracy": t.test_accuracy,
                "mean_weight": weight,
                "images_per_second": t.images_per_second,
                "epochs": t.epochs,
            }
            for t, weight in zip(results.teachers, results.weights.mean(1).tolist(), strict=True)
        ],
        "students": [
            {
                "strategy": find(row.strategy).label,
                "test_accuracy": {"mean": row.mean, "std": row.spread, "seeds": row.test_accuracy},
                "images_per_second": row.images_per_second,
                "runs": row.epochs,
            }
            for row in results.students
        ],
        "confidence_weights": results.weights.tolist(),
        "loss_speed": asdict(results.speed),
    }


def write(results: DemoResults, out: Path, environment: Mapping[str, str]) -> Path:
    """Write metrics.json and report.html into the existing folder `out`; returns the page's path."""
    (out / "metrics.json").write_text(json.dumps(metrics(results, environment), indent=1) + "\n", encoding="utf-8")
    page = out / "report.html"
    lead = _setting(results)
    write_page(page, "Three teachers, one of them poor", lead, _sections(results), footer(environment))
    return page
