"""Output of the demonstration: tables, report.html and metrics.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import mean

from ..report.page import Section, Table, rate, write_page
from ..report.plots import TEACHER_COLORS, Curve, Panel, Sample, accuracy_bars, curves, weight_histograms
from ..train.run_folder import REPORT
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
                rate(teacher.images_per_second),
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
        f"scikit-learn's handwritten digits, 8x8 pixels. Teachers learn from up to {train} labelled images, every "
        f"student ({config.student}) from only {config.student_images} of them for {config.student_epochs} epochs. "
        f"Settings were chosen on {validation} validation images; accuracies are on {test} test images. Training "
        "runs on one thread."
    )


def _verdict(results: DemoResults) -> str:
    """One sentence on the measured difference between CA-MKD and AVER."""
    camkd, aver = _row(results, CAMKD.name), _row(results, AVER.name)
    gains = [100 * gain for gain in camkd.gains(aver)]
    gain = mean(gains)
    poor, weight = min(zip(results.teachers, results.weights.mean(1).tolist(), strict=True), key=lambda pair: pair[1])
    outcome = f"{abs(gain):.1f} points {'above' if gain > 0 else 'below'}" if round(gain, 1) else "level with"
    return (
        f"CA-MKD ends {outcome} AVER in the mean over {len(gains)} seeds (standard deviation of the differences "
        f"{spread(gains):.1f}); its mean weight for the {poor.spec.name} is {weight:.2f}, compared with "
        f"{1 / len(results.teachers):.2f} in AVER."
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
    """Text summary for a terminal."""
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
        f"Confidence weight of each teacher on the students' {config.student_images} training images. The "
        f"{poor.name} was trained on {poor.images or results.sizes[0]} images that include them, with "
        f"{100 * poor.wrong_labels:.0f} % wrong labels. If all teachers agree with the label, each weight is 1/3; if "
        "one teacher confidently predicts another class, its weight is 0 and the other two have 1/2 each."
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
        Section("Weights of the teachers", _histogram_note(results), (weight_histograms(weights),)),
        Section(
            "Training",
            "Validation accuracy after each epoch, for students as mean and range over seeds. Results are those of the "
            "last epoch; no epoch is selected.",
            (curves(panels),),
        ),
        Section(
            "Weights during CA-MKD training",
            "Logit weights depend only on teachers and labels and are constant. Feature weights depend on the logits "
            "that each teacher's classifier computes from the student's features, so they change during training.",
            (curves((Panel("Mean weight per teacher", "mean weight", _weight_curves(results)),)),),
        ),
        Section("Speed of the loss", _speed_note(results.speed), (speed_table(results.speed),)),
    ]


def metrics(results: DemoResults, environment: Mapping[str, str]) -> dict[str, object]:
    """All measurements, for JSON."""
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
    """Write metrics.json and report.html into the existing folder `out`; return the page's path."""
    (out / "metrics.json").write_text(json.dumps(metrics(results, environment), indent=1) + "\n", encoding="utf-8")
    page = out / REPORT
    lead = _setting(results)
    write_page(page, "Three teachers, one of them poor", lead, _sections(results), footer(environment))
    return page
