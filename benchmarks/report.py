"""`make bench-report`: one page and PNGs from the JSON files of all devices, and the tables of the README and the docs.

Refuses results of a tree whose tests are not known to be green (benchmarks/verdict.py); then nothing is written.
The same results give the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import environment, figures, readme, results, tables
from camkd_fast.report.page import Part, Section, write_page

TITLES = {
    "logit_loss": "Logit loss",
    "small_batch": "Small batches",
    "feature_loss": "Feature loss",
    "train_step": "Training step",
    "loaders": "Loaders",
}
WORDS = {
    "logit_loss": "Two ends: `swap-in` is camkd_loss(...).loss.backward(), and everybody fills student.grad; `value + "
    "gradient` is camkd_loss_and_grad, and everybody has loss and gradient in hand. Ratios are medians over rounds in "
    "which all ran in turn. The fraction of copy bandwidth counts K + 2 passes over N x C, the least that must move.",
    "small_batch": "One call at 64 x 100, where launches and Python decide.",
    "feature_loss": "Confidence weights and weighted feature error, forward and backward.",
    "train_step": "Three ResNet-32x4 teach a VGG-8 on 3x32x32 images, batch 64, loader included.",
    "loaders": "Augmented training batches of 64.",
}


def section(suite: str, result: dict[str, Any], drawings: list[figures.Drawing]) -> Section:
    parts: list[Part] = [drawing.picture() for drawing in drawings]
    table, note = tables.TABLES[suite](result)
    if table.rows:
        parts.append(table)
    text = " ".join(filter(None, [WORDS[suite], note, f"{tables.where(result)} Tests green."]))
    return Section(f"{TITLES[suite]}: {environment.title(result['environment'])}", text, parts)


def write(root: Path, page: Path, texts: Sequence[Path]) -> list[Path]:
    """The page, the PNGs in each device's folder, and the tables in `texts`; what was written.

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
    lead = "Speed of the fused multi-teacher distillation loss, and of the training around it, beside PyTorch's own."
    write_page(
        page, "camkd-fast: measurements", lead, sections, f"Written from the results of {len(published)} device(s)."
    )
    for text in texts:
        text.write_text(readme.with_tables(text.read_text(), published))
    return [*written, *texts]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--results", type=Path, default=environment.RESULTS, help="folder of <device>/<suite>.json")
    texts = [readme.README, readme.PERFORMANCE]
    parser.add_argument("--texts", type=Path, nargs="*", default=texts, help="files that hold tables")
    arguments = parser.parse_args()
    try:
        written = write(arguments.results, arguments.results / "report.html", arguments.texts)
    except results.RefusedError as error:
        print(f"nothing written, refused:\n{error}", file=sys.stderr)
        return 1
    print("\n".join(f"written: {path}" for path in written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
