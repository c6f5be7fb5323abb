"""The tables of README.md and docs/performance.md, each between `<!-- NAME: start -->` and `<!-- NAME: end -->`.

A name is that of a suite, or `sweep`: the logit loss over the number of classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import tables
from camkd_fast.report.page import Table

ROOT = Path(__file__).parent.parent
README, PERFORMANCE = ROOT / "README.md", ROOT / "docs" / "performance.md"


def markdown(table: Table) -> str:
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def replaced(text: str, name: str, section: str) -> str:
    """`text` with the section of that name exchanged; unchanged where it has none."""
    start, end = f"<!-- {name}: start -->\n", f"<!-- {name}: end -->"
    if start not in text:
        return text
    head, _, rest = text.partition(start)
    return head + start + section + end + rest.partition(end)[2]


def with_tables(text: str, published: Mapping[str, Mapping[str, dict[str, Any]]]) -> str:
    """`text` with the tables of `published` (device -> suite -> result), one after another where devices share one."""
    sections: dict[str, list[str]] = {}
    for found in published.values():
        for suite, result in found.items():
            table, note = tables.TABLES[suite](result)
            sections.setdefault(suite, []).append(_section(table, note, result))
        if "logit_loss" in found and (swept := tables.sweep(found["logit_loss"])).rows:
            sections.setdefault("sweep", []).append(_section(swept, "", found["logit_loss"]))
    for name, parts in sections.items():
        text = replaced(text, name, "\n".join(parts))
    return text


def _section(table: Table, note: str, result: dict[str, Any]) -> str:
    return f"{markdown(table)}\n{' '.join(filter(None, (note, tables.where(result))))}\n"
