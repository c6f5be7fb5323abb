"""SVG plots of numbers and labels. matplotlib is imported only when a plot is drawn."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING

from .page import Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

# Okabe and Ito's palette, distinguishable under all common forms of colour blindness. Black is reserved for text.
GREY, ORANGE, BLUE, GREEN, SKY, VERMILLION, PURPLE = (
    *("#8a8a8a", "#e69f00", "#0072b2", "#009e73", "#56b4e9", "#d55e00", "#cc79a7"),
)
# One colour for each of up to 16 teachers: Okabe and Ito's palette, then Tol's muted one.
TEACHER_COLORS = (
    *(GREEN, SKY, VERMILLION, PURPLE, ORANGE, BLUE, GREY),
    *("#332288", "#999933", "#882255", "#44aa99", "#661100", "#6699cc", "#ddcc77", "#117733", "#cc6677"),
)
INK, FAINT = "#1f2328", "#d8dce1"


@dataclass(frozen=True)
class Sample:
    """Repeated measurements of one quantity, with its colour in all plots."""

    label: str
    color: str
    values: Sequence[float]


@dataclass(frozen=True)
class Curve:
    """Runs over the same x (1, 2, ... if None), drawn as their mean and a band from minimum to maximum."""

    label: str
    color: str
    runs: Sequence[Sequence[float]]
    dashed: bool = False
    x: Sequence[float] | None = None  # epochs


@dataclass(frozen=True)
class Panel:
    """Curves on one pair of axes, over epochs or another quantity named by `xlabel`."""

    title: str
    ylabel: str
    curves: Sequence[Curve]
    logarithmic: bool = False
    from_zero: bool = False
    xlabel: str = "epoch"


@dataclass(frozen=True)
class ClassMatrix:
    """Confusion matrix of one model: row c has the fraction of images of class c predicted as each class."""

    label: str
    shares: Sequence[Sequence[float]]  # (C, C), each row sums to 1, or to 0 without images


def new_figure(
    columns: int, height: float, widths: Sequence[float] | None = None, rows: int = 1
) -> tuple[Figure, list[Axes]]:
    """A figure of that height in inches and its axes, row by row."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(9.6, height), layout=ConstrainedLayoutEngine(w_pad=0.12))
    axes = figure.subplots(rows, columns, squeeze=False, width_ratios=widths).ravel().tolist()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(FAINT)
        axis.tick_params(colors=INK, labelsize=10, length=0, pad=5)
        axis.set_axisbelow(True)
    return figure, axes


def set_title(axis: Axes, text: str) -> None:
    axis.set_title(text, loc="left", fontsize=11, fontweight="bold", color=INK, pad=10)


def picture(figure: Figure, description: str) -> Picture:
    import matplotlib

    buffer = io.BytesIO()
    # Text as paths needs no fonts; a fixed salt makes the bytes reproducible.
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "camkd_fast"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return Picture(buffer.getvalue(), description)


def accuracy_bars(groups: Sequence[Sequence[Sample]], zoom_title: str) -> Picture:
    """Bars of mean accuracy from 0 to 100 %, in groups, and a magnified plot of the last group's runs."""
    figure, (bars, zoom) = new_figure(2, 0.42 * sum(map(len, groups)) + 1.5, widths=(3, 2))
    position, ticks, labels = 0.0, [], []
    for group in groups:
        for sample in group:
            level = mean(sample.values)
            bars.barh(position, level, height=0.68, color=sample.color)
            if len(sample.values) > 1:
                bars.hlines(position, min(sample.values), max(sample.values), color=INK, linewidth=2)
            end = max([level, *sample.values])
            bars.text(end + 1.2, position, f"{level:.1f}", va="center", fontsize=10, color=INK)
            ticks.append(position)
            labels.append(sample.label)
            position += 1
        position += 0.6
    bars.set_yticks(ticks, labels)
    bars.set_xlim(0, 109)
    bars.set_xticks(range(0, 101, 20))
    bars.invert_yaxis()
    bars.set_xlabel("accuracy on test images (%)", color=INK)
    bars.grid(axis="x", color=FAINT, linewidth=0.8)
    set_title(bars, "All models")

    _strip(zoom, groups[-1])
    zoom.set_xlabel("accuracy (%): each seed, and their mean", color=INK)
    set_title(zoom, zoom_title)
    every = "; ".join(f"{s.label}: {mean(s.values):.1f} %" for group in groups for s in group)
    return picture(figure, f"Mean accuracy on test images. {every}.")


def differences(samples: Sequence[Sample], title: str, xlabel: str) -> Picture:
    """Every difference as a dot, their means, and a line at 0."""
    figure, (axis,) = new_figure(1, 0.42 * len(samples) + 1.3)
    axis.axvline(0.0, color=INK, linewidth=1.2, linestyle=":")
    _strip(axis, samples)
    axis.set_xlabel(xlabel, color=INK)
    set_title(axis, title)
    means = "; ".join(f"{sample.label}: {mean(sample.values):+.2f}" for sample in samples)
    return picture(figure, f"{title}. Means: {means}.")


def _strip(axis: Axes, samples: Sequence[Sample]) -> None:
    """One row per sample: its values as dots, their mean as a bar."""
    for row, sample in enumerate(samples):
        axis.plot([mean(sample.values)] * 2, [row - 0.3, row + 0.3], color=sample.color, linewidth=3)
        # Vertical offsets keep equal values visible.
        rows = [row + 0.16 * (i - (len(sample.values) - 1) / 2) for i in range(len(sample.values))]
        axis.scatter(sample.values, rows, s=55, color=sample.color, edgecolor="white", linewidth=0.8, zorder=3)
    axis.set_yticks(range(len(samples)), [sample.label for sample in samples])
    axis.set_ylim(len(samples) - 0.5, -0.5)
    axis.margins(x=0.12)
    axis.grid(axis="x", color=FAINT, linewidth=0.8)


_MOST_BANDS = 4  # more bands would hide each other


def curves(panels: Sequence[Panel]) -> Picture:
    """Draw panels side by side."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_figure(len(panels), 3.5)
    for axis, panel in zip(axes, panels, strict=True):
        for line in panel.curves:
            at_epoch = list(zip(*line.runs, strict=True))
            x = range(1, len(at_epoch) + 1) if line.x is None else line.x
            # If x is not the epoch, points are single measurements, which get markers.
            style, marker = "--" if line.dashed else "-", "o" if len(x) == 1 or panel.xlabel != "epoch" else ""
            means = [mean(v) for v in at_epoch]
            axis.plot(x, means, style, marker=marker, color=line.color, linewidth=2, label=line.label)
            if len(line.runs) > 1 and len(panel.curves) <= _MOST_BANDS:
                low, high = ([pick(v) for v in at_epoch] for pick in (min, max))
                axis.fill_between(x, low, high, color=line.color, alpha=0.15, linewidth=0)
        axis.set_xlabel(panel.xlabel, color=INK)
        axis.set_ylabel(panel.ylabel, color=INK)
        if panel.logarithmic:
            axis.set_yscale("log")
            axis.minorticks_off()
        axis.xaxis.set_major_locator(MaxNLocator(integer=panel.xlabel == "epoch"))
        axis.grid(axis="y", color=FAINT, linewidth=0.8)
        if panel.from_zero:
            axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
        if len(panel.curves) > 1:
            legend = axis.legend(frameon=False, fontsize=9.5, labelcolor=INK)
            if len(panels) == 1:
                legend.set_loc("center left")
                legend.set_bbox_to_anchor((1.01, 0.5), axis.transAxes)
        set_title(axis, panel.title)
    limits = [axis.get_xlim() for axis in axes]
    for axis in axes:
        axis.set_xlim(min(left for left, _ in limits), max(right for _, right in limits))
    words = (f"{panel.title}: {', '.join(line.label for line in panel.curves)}" for panel in panels)
    over = " and ".join(dict.fromkeys("epochs" if panel.xlabel == "epoch" else panel.xlabel for panel in panels))
    return picture(figure, f"Curves over {over}. {'; '.join(words)}.")


def weight_histograms(samples: Sequence[Sample]) -> Picture:
    """One panel per teacher: histogram of its weight over images, mean, and the equal weight 1/K."""
    K = len(samples)
    top = 1.0 / max(K - 1, 1)
    figure, axes = new_figure(K, 3.1)
    for axis, sample in zip(axes, samples, strict=True):
        shares = [100.0 / len(sample.values)] * len(sample.values)
        axis.hist(sample.values, bins=25, range=(0.0, top), weights=shares, color=sample.color)
        axis.axvline(1.0 / K, color=INK, linewidth=1.2, linestyle=":")
        axis.set_xlim(-0.02 * top, 1.02 * top)
        axis.set_xlabel(f"weight $w_k$, mean {mean(sample.values):.2f}", color=INK)
        axis.grid(axis="y", color=FAINT, linewidth=0.8)
        set_title(axis, sample.label)
        axis.sharey(axes[0])
    axes[0].set_ylabel("share of images (%)", color=INK)
    axes[0].annotate(
        f"equal weight 1/{K}", (1.0 / K, 0.97), (-4, 0), ("data", "axes fraction"), "offset points",
        ha="right", va="top", fontsize=9.5, color=INK,
    )  # fmt: skip
    means = "; ".join(f"{sample.label}: mean {mean(sample.values):.2f}" for sample in samples)
    return picture(figure, f"Histograms of the confidence weight of each teacher over images. {means}.")


_MOST_IN_ROW = 4


def confusions(matrices: Sequence[ClassMatrix]) -> Picture:
    """One heat map per model: rows are true classes, columns are predictions."""
    from matplotlib.colors import PowerNorm

    rows = -(-len(matrices) // _MOST_IN_ROW)
    columns = max(3, -(-len(matrices) // rows))
    figure, axes = new_figure(columns, rows * (0.55 + 8.4 / columns), rows=rows)
    image = None
    for axis, matrix in zip(axes, matrices, strict=False):
        # A square-root colour scale makes confusions of a few per cent visible.
        image = axis.imshow(matrix.shares, cmap="Blues", norm=PowerNorm(0.5, 0.0, 1.0))
        classes = range(0, len(matrix.shares), 1 if len(matrix.shares) <= 10 else 5)
        axis.set_xticks(classes)
        axis.set_yticks(classes)
        axis.tick_params(labelsize=8)
        axis.spines[["left", "bottom"]].set_visible(False)
        axis.set_xlabel("predicted class", color=INK)
        set_title(axis, matrix.label)
    for axis in axes[len(matrices) :]:
        axis.set_visible(False)
    axes[0].set_ylabel("true class", color=INK)
    if image is not None:
        _scale(figure, image, axes[: len(matrices)])
    return picture(figure, f"Confusion matrices on the validation images of {_names(matrices)}.")


def class_accuracies(matrices: Sequence[ClassMatrix]) -> Picture:
    """One row of a heat map per model: accuracy by class."""
    levels = [[row[c] for c, row in enumerate(matrix.shares)] for matrix in matrices]
    words = f"Accuracy by class on the validation images of {_names(matrices)}."
    return class_levels([matrix.label for matrix in matrices], levels, words)


def class_levels(
    labels: Sequence[str], levels: Sequence[Sequence[float]], words: str, top: float = 1.0, percent: bool = True
) -> Picture:
    """A heat map from 0 to `top` with one labelled row of C levels each; `words` is the alternative text."""
    figure, (axis,) = new_figure(1, 1.4 + 0.42 * len(levels))
    image = axis.imshow(levels, cmap="Blues", vmin=0.0, vmax=top, aspect="auto", interpolation="nearest")
    axis.set_yticks(range(len(levels)), labels)
    axis.set_xticks(range(0, len(levels[0]), 1 if len(levels[0]) <= 20 else 10))
    axis.set_xlabel("class", color=INK)
    axis.spines[["left", "bottom"]].set_visible(False)
    _scale(figure, image, [axis], percent)
    return picture(figure, words)


def _scale(figure: Figure, image: AxesImage, axes: Sequence[Axes], percent: bool = True) -> None:
    from matplotlib.ticker import PercentFormatter

    written = PercentFormatter(1.0) if percent else None
    bar = figure.colorbar(image, ax=list(axes), format=written, pad=0.02, aspect=30, shrink=0.75)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=INK, labelsize=9, length=0)


def _names(matrices: Sequence[ClassMatrix]) -> str:
    return ", ".join(matrix.label for matrix in matrices)
