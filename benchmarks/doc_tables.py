"""The generated tables of the README and docs/, each between `<!-- NAME: start -->` and `<!-- NAME: end -->`.

NAME is a suite, `classes` (the logit loss over the number of classes), or `headline` (the README's short tables).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import suite_tables
from camkd_fast.report.page import Table

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README, PERFORMANCE, TRAINING = ROOT / "README.md", DOCS / "performance.md", DOCS / "training.md"
SPEED_UP = DOCS / "images" / "speedup.svg"


def markdown(table: Table) -> str:
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def replaced(text: str, name: str, section: str) -> str:
    """`text` with the content of section `name` replaced; unchanged if it has no such section."""
    start, end = f"<!-- {name}: start -->\n", f"<!-- {name}: end -->"
    if start not in text:
        return text
    head, _, rest = text.partition(start)
    return head + start + section + end + rest.partition(end)[2]


def with_tables(text: str, published: Mapping[str, Mapping[str, dict[str, Any]]]) -> str:
    """`text` with the tables of `published` (device -> suite -> result); tables of all devices in a row."""
    sections: dict[str, list[str]] = {}
    for found in published.values():
        for suite, result in found.items():
            table, note = suite_tables.TABLES[suite](result)
            sections.setdefault(suite, []).append(_section(table, note, result))
        if "logit_loss" in found:
            loss = found["logit_loss"]
            sections.setdefault("headline", []).append(_section(suite_tables.headline(loss), "", loss))
            if (by_classes := suite_tables.over_classes(loss)).rows:
                sections.setdefault("classes", []).append(_section(by_classes, "", loss))
    for name, parts in sections.items():
        text = replaced(text, name, "\n".join(parts))
    return text


def _section(table: Table, note: str, result: dict[str, Any]) -> str:
    return f"{markdown(table)}\n{' '.join(filter(None, (note, suite_tables.where(result))))}\n"
