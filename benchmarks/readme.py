"""Writes the README's tables from committed results: `python -m benchmarks.readme RESULT.json ...`.

A result's file name says which table it is; the table stands between `<!-- NAME: start -->` and `<!-- NAME: end -->`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

README = Path(__file__).parent.parent / "README.md"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _where(result: dict[str, Any]) -> str:
    """What a measurement must say about itself."""
    where = result["environment"]
    return (
        f"{where['processor']} ({where['instruction set']}), {where['threads']} threads, torch {where['torch']}, "
        f"commit {where['commit']}, {where['date']}."
    )


def logit_loss(result: dict[str, Any]) -> str:
    """Speed of the loss over shapes."""
    header = ["N x C", "K", "dtype", "eager ms", "compile ms", "swap-in ms", "over eager", "over compile"]
    header += ["value + gradient ms", "over eager", "over compile"]
    rows = []
    for row in result["rows"]:
        cells = [f"{row['N']} x {row['C']}", str(row["K"]), row["dtype"].removeprefix("torch.")]
        cells += [f"{row[name]['p50_ms']:.2f}" for name in ("eager", "compile")]
        for ours in ("autograd", "value_and_grad"):
            cells.append(f"{row[ours]['p50_ms']:.2f}")
            cells += [f"{row[f'{ours}_over_{theirs}']:.1f}x" for theirs in ("eager", "compile")]
        rows.append(cells)
    totals = result["summary"]
    means = "; ".join(
        f"{name} {totals[f'{key}_over_eager_geomean']:.1f}x eager and {totals[f'{key}_over_compile_geomean']:.1f}x"
        f" torch.compile, at least {totals[f'{key}_over_compile_min']:.1f}x torch.compile"
        for key, name in (("autograd", "swap-in"), ("value_and_grad", "value + gradient"))
    )
    copy = f"Copy bandwidth {result['copy_gb_per_s']:.0f} GB/s in the same run."
    return f"{table(header, rows)}\nGeometric means: {means}. {copy} {_where(result)}\n"


def train_step(result: dict[str, Any]) -> str:
    """Speed of the training step over settings."""
    header = ["step", "ms", "images/s", "speed-up", "the loss's share", "first two steps, s"]
    rows = []
    for row in result["rows"]:
        share, first = row["loss_share"], row["first_two_steps_seconds"]
        cells = [row["name"], f"{row['p50_ms']:.0f}", f"{row['images_per_second']:.0f}", f"{row['speed_up']:.1f}x"]
        rows.append([*cells, "" if share is None else f"{share:.2%}", "" if first is None else f"{first:.0f}"])
    return f"{table(header, rows)}\n{_where(result)}\n"


def loaders(result: dict[str, Any]) -> str:
    """Images per second of the loaders."""
    rows = [
        [row["images"], row["loader"], f"{row['images_per_second']:,.0f}", f"{row['speed_up']:.1f}x"]
        for row in result["rows"]
    ]
    return f"{table(['images', 'loader', 'images/s', 'over torch'], rows)}\n{_where(result)}\n"


def fashion_mnist(result: dict[str, Any]) -> str:
    """Commands, accuracies and times of the walk-through."""
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
    header = ["run", "test accuracy", "images/s", "seconds in all"]
    return f"```\n{commands}\n```\n\n{table(header, rows)}\n{_where(result)}\n"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "logit_loss": logit_loss,
    "train_step": train_step,
    "loaders": loaders,
    "fashion_mnist": fashion_mnist,
}


def insert(text: str, name: str, content: str) -> str:
    """`text` with `content` between the marks of that name, of which there is one pair."""
    start, end = f"<!-- {name}: start -->\n", f"<!-- {name}: end -->"
    head, rest = text.split(start)
    return head + start + content + end + rest.split(end)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+")
    text = README.read_text()
    for path in parser.parse_args().results:
        if path.stem not in TABLES:
            raise SystemExit(f"{path.name} must be one of {', '.join(f'{name}.json' for name in TABLES)}")
        text = insert(text, path.stem, TABLES[path.stem](json.loads(path.read_text())))
    README.write_text(text)


if __name__ == "__main__":
    main()
