"""Plots and the self-contained HTML page. Takes plain numbers and labels; knows nothing of training.

Needs matplotlib, which is imported only when a plot is drawn.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which stays apart under every common colour blindness. Black is left to text.
GREY, ORANGE, BLUE, GREEN, SKY, VERMILLION, PURPLE = (
    *("#8a8a8a", "#e69f00", "#0072b2", "#009e73", "#56b4e9", "#d55e00", "#cc79a7"),
)
_INK, _FAINT = "#1f2328", "#d8dce1"


@dataclass(frozen=True)
class Sample:
    """Repeated measurements of one thing; drawn in one colour everywhere."""

    label: str
    color: str
    values: Sequence[float]


@dataclass(frozen=True)
class Curve:
    """One line per run over the same x = 1, 2, ...; drawn as their mean in a band from lowest to highest."""

    label: str
    color: str
    runs: Sequence[Sequence[float]]
    dashed: bool = False


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]  # the first cell names the row, the others are numbers

    def text(self) -> str:
        """Aligned for a terminal: names to the left, numbers to the right."""
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
class Section:
    """A heading, a paragraph that says what to see, then its parts: tables and SVG pictures."""

    title: str
    text: str
    parts: Sequence[Table | Picture]


@dataclass(frozen=True)
class Picture:
    svg: bytes
    description: str  # for readers who do not see it

    def html(self) -> str:
        # An image of its own rather than inline nodes: the ids of several plots cannot collide.
        data = base64.b64encode(self.svg).decode()
        return f'<img alt="{html.escape(self.description, quote=True)}" src="data:image/svg+xml;base64,{data}">'


def _figure(columns: int, height: float, widths: Sequence[float] | None = None) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(9.6, height), layout=ConstrainedLayoutEngine(w_pad=0.12))
    axes = figure.subplots(1, columns, squeeze=False, width_ratios=widths)[0].tolist()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(_FAINT)
        axis.tick_params(colors=_INK, labelsize=10, length=0, pad=5)
        axis.set_axisbelow(True)
    return figure, axes


def _title(axis: Axes, text: str) -> None:
    axis.set_title(text, loc="left", fontsize=11, fontweight="bold", color=_INK, pad=10)


def _picture(figure: Figure, description: str) -> Picture:
    import matplotlib

    buffer = io.BytesIO()
    # Text as outlines looks the same without the fonts; a fixed salt makes the bytes repeatable.
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "camkd_fast"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return Picture(buffer.getvalue(), description)


def accuracy_bars(groups: Sequence[Sequence[Sample]], zoom_title: str) -> Picture:
    """Bars of mean accuracy from 0 to 100 %, in groups; the runs of the last group again beside them, enlarged."""
    figure, (bars, zoom) = _figure(2, 0.42 * sum(map(len, groups)) + 1.5, widths=(3, 2))
    position, ticks, labels = 0.0, [], []
    for group in groups:
        for sample in group:
            level = mean(sample.values)
            bars.barh(position, level, height=0.68, color=sample.color)
            if len(sample.values) > 1:
                bars.hlines(position, min(sample.values), max(sample.values), color=_INK, linewidth=2)
            end = max([level, *sample.values])
            bars.text(end + 1.2, position, f"{level:.1f}", va="center", fontsize=10, color=_INK)
            ticks.append(position)
            labels.append(sample.label)
            position += 1
        position += 0.6
    bars.set_yticks(ticks, labels)
    bars.set_xlim(0, 109)
    bars.set_xticks(range(0, 101, 20))
    bars.invert_yaxis()
    bars.set_xlabel("accuracy on held-out images (%)", color=_INK)
    bars.grid(axis="x", color=_FAINT, linewidth=0.8)
    _title(bars, "Everybody")

    for row, sample in enumerate(groups[-1]):
        zoom.plot([mean(sample.values)] * 2, [row - 0.3, row + 0.3], color=sample.color, linewidth=3)
        # A little apart, so that equal values stay two dots.
        rows = [row + 0.16 * (i - (len(sample.values) - 1) / 2) for i in range(len(sample.values))]
        zoom.scatter(sample.values, rows, s=55, color=sample.color, edgecolor="white", linewidth=0.8, zorder=3)
    zoom.set_yticks(range(len(groups[-1])), [sample.label for sample in groups[-1]])
    zoom.set_ylim(len(groups[-1]) - 0.5, -0.5)
    zoom.margins(x=0.12)
    zoom.set_xlabel("accuracy (%): each seed, and their mean", color=_INK)
    zoom.grid(axis="x", color=_FAINT, linewidth=0.8)
    _title(zoom, zoom_title)
    every = "; ".join(f"{s.label}: {mean(s.values):.1f} %" for group in groups for s in group)
    return _picture(figure, f"Mean accuracy on held-out images. {every}.")


def curves(panels: Sequence[tuple[str, str, Sequence[Curve]]]) -> Picture:
    """Panels side by side, each (title, y label, curves) over epochs."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(len(panels), 3.5)
    for axis, (title, ylabel, lines) in zip(axes, panels, strict=True):
        for line in lines:
            epochs = range(1, len(line.runs[0]) + 1)
            at_epoch = list(zip(*line.runs, strict=True))
            style = "--" if line.dashed else "-"
            axis.plot(epochs, [mean(v) for v in at_epoch], style, color=line.color, linewidth=2, label=line.label)
            if len(line.runs) > 1:
                low, high = ([pick(v) for v in at_epoch] for pick in (min, max))
                axis.fill_between(epochs, low, high, color=line.color, alpha=0.15, linewidth=0)
        axis.set_xlabel("epoch", color=_INK)
        axis.set_ylabel(ylabel, color=_INK)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(axis="y", color=_FAINT, linewidth=0.8)
        legend = axis.legend(frameon=False, fontsize=9.5, labelcolor=_INK)
        if len(panels) == 1:
            legend.set_loc("center left")
            legend.set_bbox_to_anchor((1.01, 0.5), axis.transAxes)
        _title(axis, title)
    names = ", ".join(line.label for line in panels[0][2])
    return _picture(figure, f"{'; '.join(panel[0] for panel in panels)}, over epochs, for {names}.")


def weight_histograms(samples: Sequence[Sample]) -> Picture:
    """One panel per teacher: how its weight is distributed over images, its mean, and the equal weight 1/K."""
    K = len(samples)
    top = 1.0 / max(K - 1, 1)
    figure, axes = _figure(K, 3.1)
    for axis, sample in zip(axes, samples, strict=True):
        shares = [100.0 / len(sample.values)] * len(sample.values)
        axis.hist(sample.values, bins=25, range=(0.0, top), weights=shares, color=sample.color)
        axis.axvline(1.0 / K, color=_INK, linewidth=1.2, linestyle=":")
        axis.set_xlim(-0.02 * top, 1.02 * top)
        axis.set_xlabel(f"weight $w_k$, mean {mean(sample.values):.2f}", color=_INK)
        axis.grid(axis="y", color=_FAINT, linewidth=0.8)
        _title(axis, sample.label)
        axis.sharey(axes[0])
    axes[0].set_ylabel("share of images (%)", color=_INK)
    axes[0].annotate(
        f"equal weight 1/{K}", (1.0 / K, 0.97), (-4, 0), ("data", "axes fraction"), "offset points",
        ha="right", va="top", fontsize=9.5, color=_INK,
    )  # fmt: skip
    means = "; ".join(f"{sample.label}: mean {mean(sample.values):.2f}" for sample in samples)
    return _picture(figure, f"Histograms of the confidence weight of each teacher over images. {means}.")


_STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f6f7f9; color: #1f2328; font: 16px/1.55 system-ui, "Segoe UI", sans-serif; }
main { max-width: 960px; margin: 0 auto; padding: 48px 24px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em; }
h2 { font-size: 19px; margin: 0 0 6px; }
p { margin: 0 0 16px; max-width: 75ch; }
.lead { color: #57606a; font-size: 17px; }
section { background: #fff; border: 1px solid #d8dce1; border-radius: 10px; padding: 24px; margin: 24px 0; }
section > :last-child { margin-bottom: 0; }
img { display: block; width: 100%; margin: 8px 0 20px; }
table { border-collapse: collapse; width: 100%; margin: 8px 0 20px; font-size: 15px; }
th, td { text-align: right; font-variant-numeric: tabular-nums; padding: 7px 10px; border-bottom: 1px solid #e8ebef; }
th { font-weight: 600; color: #57606a; border-bottom-color: #b9c0c8; }
th:first-child, td:first-child { text-align: left; }
footer { color: #57606a; font-size: 13px; }
"""


def write_page(path: Path, title: str, lead: str, sections: Sequence[Section], footer: str) -> None:
    """One HTML file without any external resource."""
    body = []
    for section in sections:
        parts = "\n".join(part.html() for part in section.parts)
        body.append(
            f"<section><h2>{html.escape(section.title)}</h2><p>{html.escape(section.text)}</p>\n{parts}</section>"
        )
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
        f'<body><main><h1>{html.escape(title)}</h1><p class="lead">{html.escape(lead)}</p>\n'
        + "\n".join(body)
        + f"\n<footer>{html.escape(footer)}</footer></main></body></html>\n"
    )
    path.write_text(page, encoding="utf-8")
