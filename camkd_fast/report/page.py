"""A self-contained HTML page of sections with text, tables and pictures."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class Part(Protocol):
    """An element of a section."""

    def html(self) -> str: ...


def rate(per_second: float) -> str:
    """A rate with two digits at least; empty for 0, that of a run whose few steps were not timed."""
    if not per_second:
        return ""
    return f"{per_second:,.0f}" if per_second >= 9.5 else f"{per_second:.2g}"


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]  # the first cell names the row, the others are numbers

    def text(self) -> str:
        """Text for a terminal: the first column is left-aligned, the others are right-aligned."""
        widths = [max(len(row[i]) for row in (self.header, *self.rows)) for i in range(len(self.header))]
        lines = []
        for row in (self.header, ["-" * width for width in widths], *self.rows):
            cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)

    def html(self) -> str:
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.header)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in self.rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


@dataclass(frozen=True)
class Figures:
    """A few large numbers side by side."""

    values: Mapping[str, str]  # caption -> number

    def html(self) -> str:
        cells = "".join(
            f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
            for name, value in self.values.items()
        )
        return f'<dl class="figures">{cells}</dl>'


@dataclass(frozen=True)
class Points:
    """A bulleted list of sentences."""

    items: Sequence[str]

    def html(self) -> str:
        return f"<ul>{''.join(f'<li>{html.escape(item)}</li>' for item in self.items)}</ul>"


@dataclass(frozen=True)
class Folded:
    """A table that is collapsed at first."""

    summary: str
    table: Table

    def html(self) -> str:
        return f"<details><summary>{html.escape(self.summary)}</summary>{self.table.html()}</details>"


@dataclass(frozen=True)
class Picture:
    svg: bytes
    description: str  # alternative text

    def html(self) -> str:
        # An image and not inline SVG, since the ids of several plots would collide.
        data = base64.b64encode(self.svg).decode()
        return f'<img alt="{html.escape(self.description, quote=True)}" src="data:image/svg+xml;base64,{data}">'


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph of text with `code` in backticks, and parts."""

    title: str
    text: str
    parts: Sequence[Part]


_STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f6f7f9; color: #1f2328; font: 16px/1.55 system-ui, "Segoe UI", sans-serif; }
main { max-width: 960px; margin: 0 auto; padding: 48px 24px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em; }
h2 { font-size: 19px; margin: 0 0 6px; }
p { margin: 0 0 16px; max-width: 75ch; }
ul { margin: 0 0 16px; padding-left: 1.2em; max-width: 75ch; }
li { margin: 4px 0; }
.lead { color: #57606a; font-size: 17px; }
section { background: #fff; border: 1px solid #d8dce1; border-radius: 10px; padding: 24px; margin: 24px 0; }
section { overflow-x: auto; }
section > :last-child { margin-bottom: 0; }
img { display: block; width: 100%; margin: 8px 0 20px; }
table { border-collapse: collapse; width: 100%; margin: 8px 0 20px; font-size: 15px; }
th, td { text-align: right; font-variant-numeric: tabular-nums; padding: 7px 10px; border-bottom: 1px solid #e8ebef; }
th { font-weight: 600; color: #57606a; border-bottom-color: #b9c0c8; }
th:first-child, td:first-child { text-align: left; }
td:nth-child(n+2) { white-space: nowrap; }
.figures { display: flex; flex-wrap: wrap; gap: 12px 40px; margin: 8px 0 20px; }
.figures div { display: flex; flex-direction: column-reverse; }
.figures dd { margin: 0; font-size: 26px; font-weight: 600; line-height: 1.25; font-variant-numeric: tabular-nums; }
.figures dt { color: #57606a; font-size: 14px; }
code { font: 14px ui-monospace, Menlo, monospace; background: #f0f2f5; border-radius: 4px; padding: 2px 5px; }
summary { cursor: pointer; color: #57606a; }
footer { color: #57606a; font-size: 13px; }
"""


def write_page(path: Path, title: str, lead: str, sections: Sequence[Section], footer: str) -> None:
    """Write one HTML file without external resources."""
    body = []
    for section in sections:
        parts = "\n".join(part.html() for part in section.parts)
        text = re.sub("`(.+?)`", r"<code>\1</code>", html.escape(section.text))
        body.append(f"<section><h2>{html.escape(section.title)}</h2><p>{text}</p>\n{parts}</section>")
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
        f'<body><main><h1>{html.escape(title)}</h1><p class="lead">{html.escape(lead)}</p>\n'
        + "\n".join(body)
        + f"\n<footer>{html.escape(footer)}</footer></main></body></html>\n"
    )
    path.write_text(page, encoding="utf-8")
