"""`python -m benchmarks.fashion_mnist`: the example of docs/training.md, three teachers and a student on Fashion-MNIST.

Runs the commands below through the command line, skipping finished runs, and writes the table of docs/training.md and
benchmarks/results/<device>/fashion_mnist.json. Takes about a quarter of an hour on two idle cores.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

import torch

from benchmarks import doc_tables, environment, results, suite_tables
from camkd_fast.cli import main as camkd_fast
from camkd_fast.report.page import Table
from camkd_fast.train.journal import METRICS, read_metrics
from camkd_fast.train.run_folder import is_finished

SETTINGS = "--data fashion-mnist --epochs 3 --schedule cosine --dtype bfloat16 --channels-last"
COMMANDS = {
    "t0": "teach --model resnet20 --seed 0",
    "t1": "teach --model resnet20 --seed 1",
    "t2": "teach --model resnet20 --seed 2 --wrong-labels 0.5",
    "s0": "distill --student resnet8 --teachers {runs}/t0 {runs}/t1 {runs}/t2 --strategy ca-mkd --seed 0",
}


def command(name: str, runs: Path) -> str:
    """Arguments of `camkd-fast` for one of the runs."""
    return f"{COMMANDS[name].format(runs=runs)} {SETTINGS} --out {runs / name}"


def section(result: dict[str, Any]) -> str:
    """Commands, accuracies and times in Markdown."""
    commands = "\n".join(row["command"] for row in result["rows"])
    rows = [
        [
            f"`{row['run']}`",
            f"{row['test_accuracy']:.2%}",
            f"{row['images_per_second']:,.0f}",
            f"{row['seconds']:.0f}",
        ]
        for row in result["rows"]
    ]
    table = Table(["run", "test accuracy", "images/s", "seconds in all"], rows)
    return f"```\n{commands}\n```\n\n{doc_tables.markdown(table)}\n{suite_tables.where(result)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder for the runs (default: runs)")
    runs = parser.parse_args().runs
    rows = []
    for name in COMMANDS:
        if not is_finished(runs / name):
            status = camkd_fast([*shlex.split(command(name, runs)), "--overwrite"])
            if status:
                raise SystemExit(status)
        record = read_metrics(runs / name / METRICS, "test")[-1]
        numbers = {key: record[key] for key in ("test_accuracy", "images_per_second", "seconds")}
        rows.append({"run": name, "command": f"camkd-fast {command(name, Path('runs'))}", **numbers})
    where = environment.describe(torch.device("cpu"))
    result = {"environment": where, "rows": rows}
    path = results.write(environment.results_folder(where), "fashion_mnist", result)
    page = doc_tables.TRAINING
    page.write_text(doc_tables.replaced(page.read_text(), "fashion_mnist", section(result)))
    print(f"written to {path}, and the table to {page}")


if __name__ == "__main__":
    main()
