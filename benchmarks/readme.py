"""The README's tables: each suite's, for every device in turn, between `<!-- SUITE: start -->` and `<!-- SUITE: end -->`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import tables
from camkd_fast.report.page import Table

README = Path(__file__).parent.parent / "README.md"


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
    """`text` with the tables of `published` (device -> suite -> result)."""
    for suite, table_of in tables.TABLES.items():
        sections = []
        for found in published.values():
            if suite in found:
                table, note = table_of(found[suite])
                sections.append(f"{markdown(table)}\n{' '.join(filter(None, (note, tables.where(found[suite]))))}\n")
        if sections:
            text = replaced(text, suite, "\n".join(sections))
    return text
