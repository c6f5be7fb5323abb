"""`compare --study`: run a study, or check finished cells of it."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

import torch

from ..experiments.study import cells, check, conductor, records, spec, study_report, work
from ..system import processors
from ..torchrun import processes_here, rank, world_size
from ..train import folder_lock
from ..train.config_file import differences
from ..train.provenance import commit
from ..train.run_folder import REPORT
from .info import environment
from .options import Compare, ComparedStudent


def run(command: Compare, path: Path) -> int:
    """Run the study in the file `path`, or check it; return 1 if a piece failed or differs."""
    out = command.settings.out
    given = Compare(study=path, jobs=command.jobs, results=command.results, check=command.check)
    if differences(command.settings, ComparedStudent(out=out)) or replace(command, settings=given.settings) != given:
        raise ValueError(
            f"{path} defines the comparison: with --study only --out, --jobs, --results, --check are allowed"
        )
    study, jobs = spec.load(path), _jobs(command.jobs)
    where = environment()
    origin = {
        "commit": commit(),
        "where": f"{where['processor']} ({where['instruction set']}), torch {where['torch']}",
    }
    file = out / "results.jsonl" if command.results is None else command.results
    out.mkdir(parents=True, exist_ok=True)
    if command.check:
        return _check(records.read(study, file), file, command.check, out, origin, jobs)

    def merged() -> records.Results:
        with folder_lock.shared(out, work.PIECE_LOCK):  # every rank merges; the last one to finish has all results
            done = records.collect(study, out, records.read(study, file))
            done.write(file)
        return done

    def progress(text: str) -> None:
        print(text, flush=True)
        merged()  # finished results survive a loss of `out`

    known, place = records.read(study, file).cells, {"rank": rank(), "world": world_size()}
    mine = [cell for cell in cells.assigned(cells.cells(study), **place) if cell not in known]
    failures = conductor.conduct(study, out, origin, jobs=jobs, progress=progress, only=mine, **place)
    done = merged()
    page = study_report.write(done, out / REPORT)
    print(f"{file}: {len(done.cells)} cells, {len(done.missing)} missing\n{page}")
    for failure in failures:
        print(f"camkd-fast: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _jobs(jobs: int | None) -> int:
    """Number of worker processes: as given, or one for a GPU, or one per available processor of this rank."""
    if jobs is None and torch.cuda.is_available():
        return 1
    if jobs is None:
        return max(processors() // processes_here(), 1)
    return jobs


def _check(known: records.Results, file: Path, count: int, out: Path, origin: work.Origin, jobs: int) -> int:
    chosen = check.choose(known, count, random.SystemRandom().randrange(2**32))
    if not chosen:
        raise ValueError(f"{file} holds no finished cell of the study as it is now")
    found = check.check(known, out, origin, chosen, jobs, print)
    for one in found:
        again = "not trained" if one.again is None else f"{100 * one.again:.4f} %"
        verdict = "equal" if one.agrees else "DIFFERENT"
        print(f"{one.cell}: {100 * one.kept:.4f} % in {file}, {again} now: {verdict}")
    return 0 if all(one.agrees for one in found) else 1
