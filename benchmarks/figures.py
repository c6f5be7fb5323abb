"""Plots of one device's results: fraction of copy bandwidth over C, speed-up bars, memory bars.

`python -m benchmarks.figures DIR/logit_loss.json` draws an unpublished result, with its test verdict in the picture.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks import environment
from benchmarks.suite_tables import ENDS, compared, headline_rows, share_of_copy, where
from camkd_fast.report import plots
from camkd_fast.report.page import Picture
from camkd_fast.report.plots import BLUE, FAINT, GREEN, GREY, INK, ORANGE, PURPLE, SKY, VERMILLION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
TEACHERS = {1: SKY, 2: GREEN, 3: BLUE, 5: ORANGE}
OURS = (BLUE, "#332288", "#44aa99")
OTHERS = {
    "eager": GREY,
    "compile": VERMILLION,
    "max-autotune": ORANGE,
    "loop": PURPLE,
    "liger": GREEN,
    "quack": SKY,
}


class Drawing(NamedTuple):
    name: str
    figure: Figure
    description: str  # alternative text

    def picture(self) -> Picture:
        return plots.picture(self.figure, self.description)

    def save(self, folder: Path) -> None:
        # No software version in the file, so that equal results give equal bytes.
        self.figure.savefig(folder / f"{self.name}.png", dpi=110, metadata={"Software": None})


def _colors(rows: list[Row]) -> dict[str, str]:
    """Colour of each contestant, our backends first."""
    ours = dict.fromkeys(name for row in rows for name in row["times"] if name not in OTHERS)
    return dict(zip(ours, OURS, strict=False)) | OTHERS


def roofline(result: dict[str, Any]) -> Drawing | None:
    """One panel per backend and dtype, one line per K, over C."""
    rows = [row for row in result["rows"] if row["grid"] == "classes"]
    if not rows:
        return None
    lines: dict[tuple[str, str], dict[int, list[tuple[int, float]]]] = {}
    for row in rows:
        for name in row["times"]:
            points = lines.setdefault((name, row["dtype"]), {}).setdefault(row["K"], [])
            points.append((row["C"], share_of_copy(row, name, result)))
    best = max(max(share for _, share in points) for by in lines.values() for points in by.values())
    figure, axes = plots.new_figure(min(len(lines), 2), 3.4 * -(-len(lines) // 2), rows=-(-len(lines) // 2))
    for axis, ((name, dtype), by_teachers) in zip(axes, sorted(lines.items()), strict=False):
        for K, points in sorted(by_teachers.items()):
            x, y = zip(*sorted(points), strict=True)
            axis.plot(x, y, "-o", color=TEACHERS[K], linewidth=2, markersize=4, label=f"K = {K}")
        axis.axhline(1.0, color=INK, linewidth=1.2, linestyle=":")
        axis.set_xscale("log")
        axis.set_xlabel("classes C", color=INK)
        axis.set_ylim(0, 1.25 * max(1.0, best))  # room for the legend
        axis.grid(axis="y", color=FAINT, linewidth=0.8)
        axis.legend(frameon=False, fontsize=9, ncols=4, loc="upper right", labelcolor=INK)
        plots.set_title(axis, f"{name}, {dtype}")
    for axis in axes[len(lines) :]:
        axis.set_visible(False)
    axes[0].set_ylabel("floor bytes / time, of copy bandwidth", color=INK)
    return Drawing("roofline", figure, f"Fraction of the copy bandwidth over the number of classes; best {best:.0%}.")


def _bars(axis: Axes, rows: list[Row], values: list[dict[str, float]], colors: dict[str, str], unit: str) -> None:
    """One group of horizontal bars per row on a logarithmic scale, the first row at the top."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    names = [name for name in colors if any(name in value for value in values)]
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        at = [g + (i - (len(names) - 1) / 2) * height for g, value in enumerate(values) if name in value]
        widths = [value[name] for value in values if name in value]
        axis.barh(at, widths, height=0.92 * height, color=colors[name], label=name)
        for y, width in zip(at, widths, strict=True):
            axis.text(width * 1.04, y, f"{width:.1f}{unit}", va="center", fontsize=8, color=INK)
    axis.set_xscale("log")
    longest = max(max(value.values()) for value in values)
    axis.set_xlim(min(0.9, *(0.9 * min(value.values()) for value in values)), 1.5 * longest)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.axvline(1.0, color=INK, linewidth=1.2, linestyle=":")
    axis.set_yticks(range(len(rows)), [f"{r['N']} x {r['C']}, K = {r['K']}, {r['dtype']}" for r in rows])
    axis.invert_yaxis()
    axis.grid(axis="x", color=FAINT, linewidth=0.8)
    axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5), labelcolor=INK)


def speed_ups(result: dict[str, Any]) -> Drawing | None:
    """Time of each contestant for loss and gradient, divided by ours."""
    rows = compared(result)
    if not rows:
        return None
    values = [row["over"]["grad"] for row in rows]
    figure, (axis,) = plots.new_figure(1, 0.9 + 0.17 * sum(map(len, values)) + 0.12 * len(rows))
    _bars(axis, rows, values, _colors(rows), "x")
    axis.set_xlabel("time divided by ours (logarithmic)", color=INK)
    plots.set_title(axis, f"Speed-up, {ENDS['grad']}")
    return Drawing("speed_up", figure, f"Speed-up over each contestant at {len(rows)} sizes, loss and gradient.")


def headline(results: Sequence[dict[str, Any]]) -> Picture:
    """The README's picture: one panel per device, speed-up of the swap-in over eager PyTorch and torch.compile."""
    shown = [(result, headline_rows(result)) for result in results]
    shown.sort(key=lambda found: found[0]["environment"]["device"], reverse=True)  # the GPU first
    names = {"eager": "eager PyTorch", "compile": "torch.compile"}
    # One below the other, so that the text can be read on a phone.
    figure, axes = plots.new_figure(1, 1.0 + sum(0.55 + 0.42 * len(rows) for _, rows in shown), rows=len(shown))
    figure.set_figwidth(7.0)
    figure.get_layout_engine().set(h_pad=0.14)
    axes[0].get_gridspec().set_height_ratios([1 + len(rows) for _, rows in shown])
    top = 1.5 * max(row["over"]["backward"][name] for _, rows in shown for row in rows for name in names)
    words = []
    for axis, (result, rows) in zip(axes, shown, strict=True):
        for i, (name, label) in enumerate(names.items()):
            ratios = [row["over"]["backward"][name] for row in rows]
            places = [group + (i - 0.5) * 0.38 for group in range(len(rows))]
            axis.barh(places, ratios, height=0.34, color=(GREY, BLUE)[i], label=f"over {label}")
            for y, ratio in zip(places, ratios, strict=True):
                axis.annotate(f"{ratio:.1f}x", (ratio, y), (4, 0), "data", "offset points", va="center", color=INK)
        axis.set_xscale("log")
        axis.set_xlim(1.0, top)
        axis.set_xticks([tick for tick in (1, 2, 5, 10, 20, 50, 100) if tick < top])
        axis.xaxis.set_major_formatter("{x:g}x")
        axis.minorticks_off()
        axis.set_yticks(range(len(rows)), [f"{row['N']} x {row['C']:,}, K = {row['K']}" for row in rows])
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.grid(axis="x", color=FAINT, linewidth=0.8)
        title = f"{environment.title(result['environment'])}, {rows[0]['dtype']}"
        plots.set_title(axis, title)
        each = (f"{row['N']} x {row['C']}: {row['over']['backward']['eager']:.1f}x" for row in rows)
        words.append(f"{title}: {'; '.join(each)}")
    axes[0].legend(frameon=False, fontsize=9.5, loc="lower right", labelcolor=INK)
    axes[-1].set_xlabel("speed-up of camkd_loss(...).loss.backward() (logarithmic)", color=INK)
    return plots.picture(figure, f"Speed-up of loss and gradient over eager PyTorch. {'. '.join(words)}.")


def memory(result: dict[str, Any]) -> Drawing | None:
    """Peak memory beyond the inputs, in student gradients; only a GPU's allocator reports it."""
    rows = [row for row in compared(result) if row["times"][row["ours"]]["grad"]["peak_bytes"] is not None]
    if not rows:
        return None
    values = [
        {name: entry["grad"]["peak_bytes"] / row["gradient_bytes"] for name, entry in row["times"].items()}
        for row in rows
    ]
    figure, (axis,) = plots.new_figure(1, 0.9 + 0.17 * sum(map(len, values)) + 0.12 * len(rows))
    _bars(axis, rows, values, _colors(rows), "")
    axis.set_xlabel("peak memory beyond the inputs, in student gradients (logarithmic)", color=INK)
    plots.set_title(axis, f"Memory, {ENDS['grad']}")
    return Drawing("memory", figure, f"Peak memory beyond the inputs at {len(rows)} sizes, in student gradients.")


def of_loss(result: dict[str, Any]) -> list[Drawing]:
    """Every plot that these results have data for."""
    return [drawing for drawing in (roofline(result), speed_ups(result), memory(result)) if drawing is not None]


def main(path: Path) -> None:
    result = json.loads(path.read_text())
    for drawing in of_loss(result):
        drawing.figure.suptitle(f"{where(result)} Tests {result['environment']['tests']}.", fontsize=8)
        drawing.save(path.parent)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
