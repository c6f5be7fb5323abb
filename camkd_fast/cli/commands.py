"""Implementation of the commands. Only rank 0 prints and writes reports."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from ..experiments import compare, run_report
from ..report.page import rate
from ..torchrun import rank
from ..train import run as jobs
from ..train.config import DistillConfig
from ..train.distributed import processes
from ..train.folder_lock import locked
from ..train.run import RunResult
from . import study
from .info import environment, info
from .options import (
    Bench,
    Command,
    Compare,
    ComparedStudent,
    Data,
    Demo,
    Distill,
    Evaluate,
    Export,
    Fetch,
    Info,
    Report,
    Teach,
    Teachers,
)


def run(command: Command) -> int:
    """Run a command and return the exit status; errors propagate."""
    match command:
        case Teach():
            _finish(jobs.teach(command.settings, **_how(command)))
        case Distill():
            _finish(jobs.distill(command.settings, **_how(command)))
        case Evaluate():
            _evaluate(command)
        case Teachers():
            _teachers(command)
        case Compare():
            if command.study is not None:
                return study.run(command, command.study)
            _compare(command)
        case Report():
            _print(str(run_report.write(command.run, environment())))
        case Data(action=Fetch() as fetch):
            _fetch(fetch)
        case Data():
            _print(_data_sets())
        case Bench():
            _bench(command)
        case Export():
            _export(command)
        case Demo():
            _demo(command.out)
        case Info():
            return info()
    return 0


def _how(command: Teach | Distill) -> dict[str, Any]:
    return {"resume": command.resume, "overwrite": command.overwrite, "extend": command.extend}


def _print(text: str) -> None:
    if rank() == 0:
        print(text)


def _finish(result: RunResult) -> None:
    """Write the run's report, print its result."""
    if rank() != 0:
        return
    page = run_report.write(result.out, environment())
    averaged = "" if result.averaged is None else f" ({100 * result.averaged.accuracy:.2f} % of the average)"
    speed = rate(result.images_per_second)
    print(
        f"test accuracy {100 * result.test.accuracy:.2f} %{averaged} on {result.test.images:,} images, "
        f"{f'{speed} images/s, ' if speed else ''}{run_report.duration(result.seconds)}\n{page}"
    )


def _evaluate(command: Evaluate) -> None:
    found = jobs.evaluate(command.run, command.split, command.device)
    _print(
        f"{command.run}, {found.images:,} {command.split} images: "
        f"accuracy {100 * found.accuracy:.2f} %, cross-entropy {found.loss:.4f}"
    )


def _teachers(command: Teachers) -> None:
    from ..experiments import teacher_table

    found = teacher_table.compare_teachers(
        command.sources,
        command.data_config(),
        command.split,
        class_map=command.class_map,
        device=command.device,
        batch_size=command.batch_size,
    )
    parts = [f"{found.images:,} {found.split} images of {command.data}", teacher_table.table(found).text()]
    if len(found.teachers) > 1:
        parts.append(teacher_table.agreement(found).text())
    _print("\n\n".join([*parts, *filter(None, ["\n".join(teacher_table.notes(found))])]))


def _compare(command: Compare) -> None:
    from ..experiments import compare_report

    student = command.settings
    assert isinstance(student, ComparedStudent)
    shared = DistillConfig(**{f.name: getattr(student, f.name) for f in fields(DistillConfig)})
    config = compare.CompareConfig(command.strategies, command.seeds, shared)
    cells = list(config.cells())
    compare.check_teachers(config)
    with ExitStack() as stack:
        with processes("cpu") as world:  # ends before the first cell, which has a group of its own
            world.on_main(lambda: stack.enter_context(locked(config.out)))
        for number, cell in enumerate(cells, 1):
            _print(f"{cell.strategy}, seed {cell.seed} ({number} of {len(cells)})")
            kept = compare.kept(config, number - 1, command.overwrite)
            compare.run_cell(cell, command.overwrite, command.extend, kept)
        if rank() == 0:
            rows = compare.collect(config)
            page = compare_report.write(config, rows, environment())
            print(f"\n{compare_report.student_table(rows).text()}\n\n{page}")


def _fetch(command: Fetch) -> None:
    from tqdm import tqdm

    from ..data import fetch

    bars: dict[str, tqdm[NoReturn]] = {}

    def progress(name: str, there: int, size: int) -> None:
        if name not in bars:
            bars[name] = tqdm(total=size, unit="B", unit_scale=True, desc=name, dynamic_ncols=True)
        bars[name].update(there - bars[name].n)
        if there >= size:
            bars[name].close()

    files = fetch.fetch(command.name, command.root, command.base_url, progress)
    _print("\n".join(map(str, files)))


def _data_sets() -> str:
    """One line per data set: its name, and its location or how to get it."""
    from ..data import catalogue, fashion_mnist, fetch

    lines = []
    for name in catalogue.NAMES:
        if name == "digits":
            where = "comes with scikit-learn"
        elif name == "folder":
            where = "any class-per-folder tree of image files at --root"
        else:
            folders = [fetch.default_folder(name), *([fashion_mnist.DEBIAN] if name == "fashion-mnist" else [])]
            found = next((folder for folder in folders if any(folder.glob("[!.]*"))), None)
            way = f"camkd-fast data fetch {name}" if name in fetch.SOURCES else "extract the published files there"
            where = f"nothing in {folders[0]}: {way}" if found is None else str(found)
        lines.append(f"{name:<14} {where}")
    return "\n".join(lines)


def _bench(command: Bench) -> None:
    from ..experiments.loss_speed import measure_loss_speed
    from ..report.page import Table

    names = ["eager", *(["torch.compile"] if command.compiled else [])]
    rows, note = [], ""
    for images, classes, teachers in command.sizes():
        speed = measure_loss_speed(images, classes, teachers, command.rounds, command.compiled)
        times = speed.milliseconds
        cells = [
            cell
            for name in names
            for cell in ((f"{times[name]:.2f} ms", f"{speed.speedup(name):.1f}x") if name in times else ("", ""))
        ]
        rows.append((f"{images} x {classes} x {teachers}", f"{times['fused']:.2f} ms", *cells))
        note = speed.note or note
    header = ("images x classes x teachers", "fused", *(cell for name in names for cell in (name, "slower")))
    _print(f"{Table(header, rows).text()}\n{note}".rstrip())


def _export(command: Export) -> None:
    from ..train.export import TOLERANCE, export

    done = export(command.run, command.out, command.folded)
    for path, difference in ((done.onnx, done.onnx_difference), (done.program, done.program_difference)):
        _print(f"{path}  differs from the model by {difference:.1e} of the largest logit (tolerance {TOLERANCE:.0e})")


def _demo(out: Path) -> None:
    from ..experiments import demo, demo_report

    with locked(out):
        results = demo.run_demo(demo.DemoConfig(), out)
        page = demo_report.write(results, out, environment())
    _print(f"\n{demo_report.summary(results)}\n\n{page}")
