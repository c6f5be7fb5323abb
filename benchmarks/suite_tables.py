"""The table of each suite and the sentence below it, for the terminal, the documentation and the HTML page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks import environment, shapes
from benchmarks.results import geometric_mean
from camkd_fast.report.page import Table

Result = dict[str, Any]
ENDS = {"backward": "swap-in", "grad": "value + gradient"}


def where(result: Result) -> str:
    """Device, torch version, commit and date of a measurement, in one sentence."""
    found = result["environment"]
    return f"{environment.title(found)}, torch {found['torch']}, commit {found['commit']}, {found['date']}."


def compared(result: Result) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if row["grid"] == "compared"]


def headline_rows(result: Result) -> list[dict[str, Any]]:
    """The rows that the README and its picture show; all compared rows if none of their sizes is in the result."""
    shown = {
        (s.N, s.C, s.K, str(s.dtype).removeprefix("torch.")) for s in shapes.HEADLINE[result["environment"]["device"]]
    }
    rows = compared(result)
    return [row for row in rows if (row["N"], row["C"], row["K"], row["dtype"]) in shown] or rows


def headline(result: Result) -> Table:
    """The swap-in loss of the README: milliseconds, and the time of the others divided by ours."""
    rows = headline_rows(result)
    names = {"eager": "over eager", "compile": "over torch.compile"}
    cells = []
    for row in rows:
        over = [f"{row['over']['backward'][name]:.1f}x" for name in names]
        cells.append([*_size(row), f"{row['times'][row['ours']]['backward']['p50_ms']:.3f}", *over])
    return Table(["N x C", "K", "dtype", "ms", *names.values()], cells)


def _size(row: dict[str, Any]) -> list[str]:
    return [f"{row['N']} x {row['C']}", str(row["K"]), row["dtype"]]


def logit_loss(result: Result) -> tuple[Table, str]:
    """Our milliseconds at both end points, and the time of the others divided by ours."""
    rows = compared(result)
    others = list(dict.fromkeys(name for row in rows for name in row["over"]["grad"]))
    header = ["N x C", "K", "dtype"]
    for title in ENDS.values():
        header += [f"{title} ms", *(f"over {name}" for name in others)]
    cells = []
    for row in rows:
        line = _size(row)
        for end in ENDS:
            line.append(f"{row['times'][row['ours']][end]['p50_ms']:.3f}")
            line += [f"{row['over'][end][name]:.1f}x" if name in row["over"][end] else "" for name in others]
        cells.append([*line, f"{row['share_of_copy']:.0%}"])
    return Table([*header, "of copy"], cells), logit_loss_note(result)


def logit_loss_note(result: Result) -> str:
    rows = compared(result)
    sentences = []
    for end, title in ENDS.items():
        names = [n for n in ("eager", "compile", "max-autotune") if all(n in row["over"][end] for row in rows)]
        ratios = {name: [row["over"][end][name] for row in rows] for name in names}
        means = " and ".join(f"{geometric_mean(values):.1f}x {name}" for name, values in ratios.items())
        least = ", ".join(f"{min(values):.1f}x {name}" for name, values in ratios.items() if name != "eager")
        if names:
            sentences.append(f"{title} {means}" + (f", at least {least}" if least else ""))
    means = f"Geometric means: {'; '.join(sentences)}. " if sentences else ""
    return (
        f"{means}Copy bandwidth {result['copy_gb_per_s']:.0f} GB/s in the same run; starting the autograd engine takes "
        f"{result['engine_start_us']:.0f} us."
    )


def over_classes(result: Result) -> Table:
    """Fraction of the copy bandwidth over C for value and gradient; one row per backend, dtype and K."""
    rows = [row for row in result["rows"] if row["grid"] == "classes"]
    classes = sorted({row["C"] for row in rows})
    shares: dict[tuple[str, str, int], dict[int, float]] = {}
    for row in rows:
        for name in row["times"]:
            shares.setdefault((name, row["dtype"], row["K"]), {})[row["C"]] = share_of_copy(row, name, result)
    cells = [
        [f"{name}, {dtype}, K = {K}", *(f"{at[C]:.0%}" if C in at else "" for C in classes)]
        for (name, dtype, K), at in sorted(shares.items())
    ]
    return Table(["of copy at C =", *map(str, classes)], cells)


def share_of_copy(row: dict[str, Any], name: str, result: Result) -> float:
    """Floor bytes per time of value and gradient, as a fraction of the copy bandwidth of the same run."""
    return row["floor_bytes"] / (row["times"][name]["grad"]["p50_ms"] * 1e6) / result["copy_gb_per_s"]


def small_batch(result: Result) -> tuple[Table, str]:
    """The cost of one call where launches dominate, not bytes."""
    header = ["64 x 100, loss + backward", "call us", "in a CUDA graph us", "on the device us", "launches"]
    rows = []
    for row in result["rows"]:
        values = (row["call_us"], row["graph_us"], row["device_us"], row["launches"])
        rows.append([row["name"], *("" if value is None else f"{value:.0f}" for value in values)])
    return Table(header, rows), " ".join(result["notes"])


def feature_loss(result: Result) -> tuple[Table, str]:
    """Forward + backward with learned weights, and value + gradient with constant ones where it was measured."""
    names = list(result["rows"][0]["over"])
    columns = ["ms", *(f"over {name}" for name in names), "of copy"]
    in_one_pass = "grad" in result["rows"][0]
    header = ["features", "K", "dtype", *columns]
    if in_one_pass:
        header += [*(f"value + gradient {column}" for column in columns), "host us"]
    rows = []
    for row in result["rows"]:
        ours = row["times"][row["ours"]]
        cells = [row["features"], str(row["K"]), row["dtype"], *_feature_cells(row, ours, names)]
        if in_one_pass:
            cells += [*_feature_cells(row["grad"], ours["grad"], names), f"{ours['grad']['host_us']:.0f}"]
        rows.append(cells)
    return Table(header, rows), f"Copy bandwidth {result['copy_gb_per_s']:.0f} GB/s in the same run."


def _feature_cells(end: dict[str, Any], ours: dict[str, Any], names: list[str]) -> list[str]:
    ratios = [f"{end['over'][name]:.1f}x" for name in names]
    return [f"{ours['p50_ms']:.2f}", *ratios, f"{end['share_of_copy']:.0%}"]


def linear_loss(result: Result) -> tuple[Table, str]:
    """Our milliseconds, the share of its products, and the time of the others divided by ours."""
    others = list(dict.fromkeys(name for row in result["rows"] for name in row["over"]))
    on_gpu = result["environment"]["device"] == "cuda"
    header = ["N x C", "widths", "K", "dtype", "ms", "products' share", *(f"over {name}" for name in others)]
    rows = []
    for row in result["rows"]:
        entry = row["times"][row["ours"]]
        cells = [f"{row['N']} x {row['C']}", " and ".join(map(str, row["H"])), str(row["K"]), row["dtype"]]
        cells += [f"{entry['p50_ms']:.1f}", f"{row['share_of_products']:.0%}"]
        cells += [f"{row['over'][name]:.2f}x" if name in row["over"] else "" for name in others]
        rows.append([*cells, f"{entry['peak_bytes'] / 1e9:.2f}"] if on_gpu else cells)
    return Table([*header, "peak GB"] if on_gpu else header, rows), ""


def train_step(result: Result) -> tuple[Table, str]:
    """Speed of the training step by configuration."""
    header = ["step", "ms", "images/s", "speed-up", "the loss's share", "first two steps, s"]
    on_gpu = "gpu_busy" in result["rows"][0]
    if on_gpu:
        header += ["one step, ms", "launches", "GPU busy"]
    rows = []
    for row in result["rows"]:
        share, first = row["loss_share"], row["first_two_steps_seconds"]
        milliseconds = f"{row['p50_ms']:.{2 if on_gpu else 0}f}"
        cells = [row["name"], milliseconds, f"{row['images_per_second']:.0f}", f"{row['speed_up']:.1f}x"]
        cells += ["" if share is None else f"{share:.2%}", "" if first is None else f"{first:.0f}"]
        if on_gpu:
            cells += [f"{row['latency_ms']:.2f}", f"{row['launches']:.0f}", f"{row['gpu_busy']:.0%}"]
        rows.append(cells)
    return Table(header, rows), ""


def loaders(result: Result) -> tuple[Table, str]:
    """Images per second of the loaders."""
    rows = [
        [row["images"], row["loader"], f"{row['images_per_second']:,.0f}", f"{row['speed_up']:.1f}x"]
        for row in result["rows"]
    ]
    return Table(["images", "loader", "images/s", "over torch"], rows), ""


TABLES: dict[str, Callable[[Result], tuple[Table, str]]] = {
    "logit_loss": logit_loss,
    "small_batch": small_batch,
    "feature_loss": feature_loss,
    "linear_loss": linear_loss,
    "train_step": train_step,
    "loaders": loaders,
}


def text(suite: str, result: Result) -> str:
    """For a terminal."""
    if suite == "logit_loss" and not compared(result):
        return f"{len(result['rows'])} sizes over C"
    table, note = TABLES[suite](result)
    tests = f"tests of this tree: {result['environment']['tests']}"
    return "\n".join(filter(None, [table.text(), note, *result["notes"], where(result), tests]))
