"""What the demonstration prints and writes: tables, report.html and metrics.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from ..report import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    SKY,
    VERMILLION,
    Curve,
    Sample,
    Section,
    Table,
    accuracy_bars,
    curves,
    weight_histograms,
    write_page,
)
from .demo import DemoResults, StudentResult
from .loop import EpochRecord, History

STRATEGY_COLORS = (GREY, ORANGE, BLUE)
TEACHER_COLORS = (GREEN, SKY, VERMILLION)


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
                f"{teacher.history.images_per_second:,.0f}",
            )
        )
    return Table(("teacher", "trained on", "wrong labels", "held-out accuracy", "mean weight", "images/s"), rows)


def student_table(results: DemoResults) -> Table:
    rows = []
    for student in results.students:
        rows.append(
            (
                student.strategy,
                f"{100 * student.mean:.1f} %",
                f"{100 * student.spread:.1f} points",
                ", ".join(f"{100 * accuracy:.1f}" for accuracy in student.test_accuracy),
                f"{student.images_per_second:,.0f}",
            )
        )
    return Table(("student", "held-out accuracy", "deviation", "each seed", "images/s"), rows)


def speed_table(results: DemoResults) -> Table:
    speed = results.speed
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
        f"that there is something to gain. {validation} images served to choose settings, {test} others are held out "
        "for the accuracies below. Training runs on one thread."
    )


def _verdict(results: DemoResults) -> str:
    """The comparison with AVER as it came out, whichever way."""
    by_name = {student.strategy: student for student in results.students}
    aver, camkd = by_name["AVER"], by_name["CA-MKD"]
    gain = 100 * (camkd.mean - aver.mean)
    poor, weight = min(zip(results.teachers, results.weights.mean(1).tolist(), strict=True), key=lambda pair: pair[1])
    outcome = f"{abs(gain):.1f} points {'above' if gain > 0 else 'below'}" if round(gain, 1) else "level with"
    return (
        f"CA-MKD ends {outcome} AVER in the mean over {len(camkd.test_accuracy)} seeds; it gives the {poor.spec.name} "
        f"a mean weight of {weight:.2f} where AVER gives {1 / len(results.teachers):.2f}."
    )


def _speed_note(results: DemoResults) -> str:
    speed = results.speed
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
            student_table(results).text(),
            _verdict(results),
            _speed_note(results),
            speed_table(results).text(),
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


def _validation(history: History) -> list[float]:
    return [100 * record.validation_accuracy for record in history.epochs]


def _weight_curves(results: DemoResults, camkd: StudentResult) -> list[Curve]:
    def series(history: History, k: int, of: str) -> list[float]:
        return [getattr(record, of)[k] for record in history.epochs]

    lines = []
    for of, kind in (("weights", "logits"), ("feature_weights", "features")):
        for k, (teacher, color) in enumerate(zip(results.teachers, TEACHER_COLORS, strict=True)):
            runs = [series(history, k, of) for history in camkd.histories]
            lines.append(Curve(f"{teacher.spec.name}, {kind}", color, runs, dashed=kind == "features"))
    return lines


def _sections(results: DemoResults) -> list[Section]:
    teachers = [
        Sample(t.spec.name, color, [100 * t.test_accuracy])
        for t, color in zip(results.teachers, TEACHER_COLORS, strict=True)
    ]
    students = [
        Sample(s.strategy, color, [100 * accuracy for accuracy in s.test_accuracy])
        for s, color in zip(results.students, STRATEGY_COLORS, strict=True)
    ]
    student_curves = [
        Curve(s.strategy, color, [_validation(h) for h in s.histories])
        for s, color in zip(results.students, STRATEGY_COLORS, strict=True)
    ]
    teacher_curves = [
        Curve(t.spec.name, color, [_validation(t.history)])
        for t, color in zip(results.teachers, TEACHER_COLORS, strict=True)
    ]
    weights = [
        Sample(t.spec.name, color, row.tolist())
        for t, color, row in zip(results.teachers, TEACHER_COLORS, results.weights, strict=True)
    ]
    camkd = next(student for student in results.students if student.strategy == "CA-MKD")
    return [
        Section(
            "Accuracy on held-out images",
            _verdict(results),
            (
                accuracy_bars((teachers, students), "Students, enlarged"),
                teacher_table(results),
                student_table(results),
            ),
        ),
        Section(
            "Whom CA-MKD believes",
            _histogram_note(results),
            (weight_histograms(weights),),
        ),
        Section(
            "Training",
            "Validation accuracy after each epoch, students as mean and range over seeds. No epoch is selected: the "
            "last one counts.",
            (
                curves(
                    (
                        ("Students", "validation accuracy (%)", student_curves),
                        ("Teachers", "validation accuracy (%)", teacher_curves),
                    )
                ),
            ),
        ),
        Section(
            "Weights during CA-MKD training",
            "The logit weights depend on teachers and labels only and stay level. The feature weights judge how well "
            "each teacher's own classifier reads the student's features, so they move as the student learns.",
            (curves((("Mean weight per teacher", "mean weight", _weight_curves(results, camkd)),)),),
        ),
        Section("Speed of the loss", _speed_note(results), (speed_table(results),)),
    ]


def _record(record: EpochRecord) -> dict[str, object]:
    return asdict(record)


def metrics(results: DemoResults, environment: Mapping[str, str]) -> dict[str, object]:
    """Everything measured, ready for JSON."""

    def history(of: History) -> dict[str, object]:
        return {"images_per_second": of.images_per_second, "epochs": [_record(record) for record in of.epochs]}

    return {
        "environment": dict(environment),
        "config": asdict(results.config),
        "images": dict(zip(("train", "validation", "test"), results.sizes, strict=True)),
        "teachers": [
            {**asdict(t.spec), "test_accuracy": t.test_accuracy, "mean_weight": weight, **history(t.history)}
            for t, weight in zip(results.teachers, results.weights.mean(1).tolist(), strict=True)
        ],
        "students": [
            {
                "strategy": s.strategy,
                "test_accuracy": {"mean": s.mean, "std": s.spread, "seeds": s.test_accuracy},
                "images_per_second": s.images_per_second,
                "runs": [history(h) for h in s.histories],
            }
            for s in results.students
        ],
        "confidence_weights": results.weights.tolist(),
        "loss_speed": asdict(results.speed),
    }


def write(results: DemoResults, out: Path, environment: Mapping[str, str]) -> Path:
    """Write metrics.json and report.html into the existing folder `out`; returns the page's path."""
    (out / "metrics.json").write_text(json.dumps(metrics(results, environment), indent=1) + "\n", encoding="utf-8")
    page = out / "report.html"
    footer = ", ".join(f"{name} {value}" for name, value in environment.items())
    write_page(page, "Three teachers, one of them poor", _setting(results), _sections(results), footer)
    return page
