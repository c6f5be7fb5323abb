"""Writes the README's speed table from a committed result: `python -m benchmarks.readme RESULT.json`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- bench: start -->\n", "<!-- bench: end -->"


def table(result: dict[str, Any]) -> str:
    """The result as Markdown, device and commit in its caption."""
    lines = [
        "| N x C | K | dtype | eager ms | compile ms | swap-in ms | over eager | over compile | value + gradient ms |"
        " over eager | over compile |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        cells = [f"{row['N']} x {row['C']}", str(row["K"]), row["dtype"].removeprefix("torch.")]
        cells += [f"{row[name]['p50_ms']:.2f}" for name in ("eager", "compile")]
        for ours in ("autograd", "value_and_grad"):
            cells.append(f"{row[ours]['p50_ms']:.2f}")
            cells += [f"{row[f'{ours}_over_{theirs}']:.1f}x" for theirs in ("eager", "compile")]
        lines.append(f"| {' | '.join(cells)} |")
    where, totals = result["environment"], result["summary"]
    means = "; ".join(
        f"{name} {totals[f'{key}_over_eager_geomean']:.1f}x eager and {totals[f'{key}_over_compile_geomean']:.1f}x"
        f" torch.compile, at least {totals[f'{key}_over_compile_min']:.1f}x torch.compile"
        for key, name in (("autograd", "swap-in"), ("value_and_grad", "value + gradient"))
    )
    lines.append(
        f"\nGeometric means: {means}. {where['processor']} ({where['instruction set']}), {where['threads']} threads, "
        f"torch {where['torch']}, copy bandwidth {result['copy_gb_per_s']:.0f} GB/s in the same run, commit "
        f"{where['commit']}, {where['date']}."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    result = json.loads(parser.parse_args().result.read_text())
    text = README.read_text()
    head, rest = text.split(START)
    README.write_text(head + START + table(result) + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
