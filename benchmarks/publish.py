"""`make bench-report`: the HTML page, the plots, and the tables of the README and docs/, from the committed JSON files.

Refuses results of a commit whose tests are not known to be green (benchmarks/verdict.py) and then writes nothing. Equal
results give equal bytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import doc_tables, environment, figures, results, suite_tables
from camkd_fast.report.page import Part, Section, write_page

TITLES = {
    "logit_loss": "Logit loss",
    "small_batch": "Small batches",
    "feature_loss": "Feature loss",
    "linear_loss": "Loss from hidden states and heads",
    "train_step": "Training step",
    "loaders": "Loaders",
}
WORDS = {
    "logit_loss": "Two end points: `swap-in` is camkd_loss(...).loss.backward(), which fills student.grad; `value + "
    "gradient` is camkd_loss_and_grad, which returns loss and gradient. Ratios are medians over interleaved rounds. "
    "The fraction of copy bandwidth counts K + 2 passes over N x C, the minimum.",
    "small_batch": "One call at 64 x 100, where launches and Python dominate.",
    "feature_loss": "Confidence weights and weighted feature error, forward and backward.",
    "linear_loss": "Hidden states and heads of a student and K teachers, forward and backward, T = 1. The products' "
    "share is the time of the matrix products by themselves, as PyTorch computes them, divided by that of the whole "
    "loss: over 100 % where a faster library computes ours.",
    "train_step": "Three ResNet-32x4 teach a VGG-8 on 3x32x32 images, batch 64, loader included.",
    "loaders": "Augmented training batches of 64.",
}


def section(suite: str, result: dict[str, Any], drawings: list[figures.Drawing]) -> Section:
    parts: list[Part] = [drawing.picture() for drawing in drawings]
    table, note = suite_tables.TABLES[suite](result)
    if table.rows:
        parts.append(table)
    text = " ".join(filter(None, [WORDS[suite], note, f"{suite_tables.where(result)} Tests green."]))
    return Section(f"{TITLES[suite]}: {environment.title(result['environment'])}", text, parts)


def write(root: Path, page: Path, texts: Sequence[Path], speed_up: Path) -> list[Path]:
    """Write the page, each device's PNGs, the tables in `texts` and the README's picture; return the paths.

    Raises:
        RefusedError: see `results.publishable`.
    """
    published = results.publishable(root)
    sections, written = [], [page]
    for device, found in published.items():
        for suite, result in found.items():
            drawings = figures.of_loss(result) if suite == "logit_loss" else []
            sections.append(section(suite, result, drawings))
            for drawing in drawings:
                drawing.save(root / device)
                written.append(root / device / f"{drawing.name}.png")
    lead = "Speed of the fused multi-teacher distillation loss and of training with it, compared with PyTorch."
    write_page(
        page, "camkd-fast: measurements", lead, sections, f"Written from the results of {len(published)} device(s)."
    )
    for text in texts:
        text.write_text(doc_tables.with_tables(text.read_text(), published))
    losses = [found["logit_loss"] for found in published.values() if "logit_loss" in found]
    if losses:
        speed_up.parent.mkdir(parents=True, exist_ok=True)
        speed_up.write_bytes(figures.headline(losses).svg)
        written.append(speed_up)
    return [*written, *texts]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--results", type=Path, default=environment.RESULTS, help="folder with <device>/<suite>.json")
    texts = [doc_tables.README, doc_tables.PERFORMANCE]
    parser.add_argument("--texts", type=Path, nargs="*", default=texts, help="Markdown files with tables")
    parser.add_argument("--speed-up", type=Path, default=doc_tables.SPEED_UP, help="SVG file of the README's picture")
    arguments = parser.parse_args()
    try:
        written = write(arguments.results, arguments.results / "report.html", arguments.texts, arguments.speed_up)
    except results.RefusedError as error:
        print(f"refused, nothing written:\n{error}", file=sys.stderr)
        return 1
    print("\n".join(f"written: {path}" for path in written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
