"""A run's page: its content matches the run's files, and it loads no other file."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from camkd_fast.data import LabelledImages
from camkd_fast.experiments import run_report
from camkd_fast.report.page import Figures, Folded, Picture, Section, Table, rate, write_page
from camkd_fast.report.plots import ClassMatrix, Curve, Panel, class_accuracies, confusions, curves
from camkd_fast.train import run, run_images
from camkd_fast.train.config import DataConfig, DistillConfig, LogConfig, OptimConfig, TeachConfig
from camkd_fast.train.confusion import confusion

ENVIRONMENT = {"torch": torch.__version__, "processor": "a <fast> one"}
QUIET = LogConfig(log_every=2, tensorboard=False, progress=False)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teachers t0 and t1 (with mostly wrong labels), and the student of both."""
    folder = tmp_path_factory.mktemp("runs")
    data, optim = DataConfig(images=100, augmentation="none"), OptimConfig(epochs=2, batch_size=20)
    for k in (0, 1):
        run.teach(TeachConfig("resnet8", k, folder / f"t{k}", 0.8 * k, data=data, optim=optim, log=QUIET))
    teachers = (folder / "t0", folder / "t1")
    run.distill(DistillConfig("resnet8", teachers, out=folder / "s0", data=data, optim=optim, log=QUIET))
    return folder


def page_of(folder: Path) -> str:
    path = run_report.write(folder, ENVIRONMENT)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def assert_self_contained(page: str) -> None:
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert "http" not in page and "<script" not in page and "@import" not in page and "url(" not in page
    for picture in re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page):
        svg = base64.b64decode(picture).decode()
        # XML namespaces are the only URLs.
        assert not re.search(r'(href|src)="(?!#|data:)[^"]*//', svg)


def headings(page: str) -> list[str]:
    return re.findall("<h2>(.*?)</h2>", page)


def test_a_students_page_has_everything(runs: Path) -> None:
    page = page_of(runs / "s0")
    assert_self_contained(page)
    assert headings(page) == [
        "Result",
        "Training",
        "Weights of the teachers",
        "Confusion matrices",
        "Throughput",
        "Settings",
    ]
    assert page.count('<img alt="') == 4
    described = html.unescape(" ".join(re.findall('alt="(.*?)"', page)))
    for words in (
        "Loss: total, cross-entropy, distillation, features; Accuracy: training, augmented, validation",
        "t0, logits, t1, logits, t0, features, t1, features",
        "Confusion matrices on the validation images of t0, t1, student",
        "Throughput: images per second; Learning rate: learning rate",
    ):
        assert words in described
    assert "processor a &lt;fast&gt; one" in page


@pytest.mark.parametrize(
    ("per_second", "text"),
    [(0.0, ""), (0.0421, "0.042"), (0.4, "0.4"), (9.44, "9.4"), (9.7, "10"), (12.3, "12"), (54321.0, "54,321")],
)
def test_rates_have_digits(per_second: float, text: str) -> None:
    assert rate(per_second) == text


def test_a_run_that_was_not_timed_has_no_rate(runs: Path, tmp_path: Path) -> None:
    short = shutil.copytree(runs / "s0", tmp_path / "s0")
    lines = [json.loads(line) for line in (short / "metrics.jsonl").read_text().splitlines()]
    lines[-1]["images_per_second"] = 0.0
    (short / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "images per second</dt>" in page_of(runs / "s0")
    assert "images per second</dt>" not in page_of(short)


def test_numbers_are_those_of_the_run(runs: Path) -> None:
    page = page_of(runs / "s0")
    records = [json.loads(line) for line in (runs / "s0/metrics.jsonl").read_text().splitlines()]
    epoch, test = [record for record in records if record["kind"] == "epoch"][-1], records[-1]
    assert test["kind"] == "test"
    figures = dict(re.findall("<div><dt>(.*?)</dt><dd>(.*?)</dd></div>", page))
    assert figures["test accuracy"] == f"{100 * test['test_accuracy']:.2f} %"
    assert figures["validation accuracy"] == f"{100 * epoch['validation_accuracy']:.2f} %"
    assert figures["images per second"] == rate(test["images_per_second"]) != ""
    rows = [re.findall("<td>(.*?)</td>", row) for row in re.findall("<tr>(<td>.*?)</tr>", page)]
    # The report evaluates the student again, with other code than the loop.
    assert ["student", "resnet8", "77,754", figures["validation accuracy"], ""] in rows
    weights = {row[0]: row[-1] for row in rows if row[0] in ("t0", "t1")}
    assert weights == {f"t{k}": f"{epoch['weights'][k]:.3f}" for k in (0, 1)}
    # Changed settings are listed with their defaults; the full list has none.
    assert ["student", "resnet8", "vgg8"] in rows and ["optim.epochs", "2", "240"] in rows
    assert ["log.progress", "False"] in rows and ["temperature", "4"] in rows


def test_a_teachers_page_has_no_weights(runs: Path) -> None:
    page = page_of(runs / "t1")
    assert_self_contained(page)
    assert headings(page) == ["Result", "Training", "Confusion matrices", "Throughput", "Settings"]
    assert "80% of the training labels are deliberately wrong" in page and "mean weight" not in page


def test_the_same_run_gives_the_same_page(runs: Path) -> None:
    assert page_of(runs / "t0") == page_of(runs / "t0")


def test_without_validation_images_there_is_no_confusion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = run_images.load_splits(DataConfig())
    few = splits.train.take(torch.arange(40))
    bare = splits._replace(train=few, validation=few.take(torch.arange(0)))
    monkeypatch.setattr(run, "load_splits", lambda config: bare)
    monkeypatch.setattr(run_report, "load_splits", lambda config: bare)
    run.teach(TeachConfig("resnet8", out=tmp_path / "t", optim=OptimConfig(epochs=1), log=QUIET))
    page = page_of(tmp_path / "t")
    assert headings(page) == ["Result", "Training", "Throughput", "Settings"]
    assert "validation accuracy" not in dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", page))


def test_a_loss_of_exactly_0_is_drawn(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes((runs / "t0/config.yaml").read_bytes())
    lines = [json.loads(line) for line in (runs / "t0/metrics.jsonl").read_text().splitlines()]
    nothing = {"loss": 0.0, "hard": 0.0, "feature": 0.0}
    lines = [{**line, **(nothing if line["kind"] in ("steps", "epoch") else {})} for line in lines]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "cross-entropy" in page_of(tmp_path)


def test_an_unfinished_run_has_a_page_and_says_so(runs: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "config.yaml").write_bytes((runs / "s0/config.yaml").read_bytes())
    lines = (runs / "s0/metrics.jsonl").read_text().splitlines(keepends=True)
    last = next(i for i, line in enumerate(lines) if '"kind": "epoch"' in line)
    (cut / "metrics.jsonl").write_text("".join(lines[: last + 2]))
    page = page_of(cut)
    assert "Not finished: 1 of 2 epochs are done." in page
    assert "Confusion matrices on the validation images of t0, t1." in page


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_what_is_missing_is_named(runs: Path, tmp_path: Path, name: str) -> None:
    for copied in {"config.yaml", "metrics.jsonl"} - {name}:
        (tmp_path / copied).write_bytes((runs / "t0" / copied).read_bytes())
    with pytest.raises(FileNotFoundError, match=name):
        run_report.write(tmp_path, ENVIRONMENT)


# --- confusion -------------------------------------------------------------------------------------------------------


class Says(nn.Module):
    """Predicts the first pixel of the image plus an offset."""

    def __init__(self, offset: int) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.tensor(float(offset)), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        answer = (images[:, 0, 0, 0] + self.offset).round().long() % 3
        return nn.functional.one_hot(answer, 3).float()


def test_confusion_counts_every_image_once() -> None:
    labels = torch.arange(600) % 3
    pixels = labels.to(torch.uint8).view(-1, 1, 1, 1).expand(600, 1, 2, 2).contiguous()
    pixels[:10] = 2  # 4 of class 0, 3 each of classes 1 and 2, all predicted as 2
    found = confusion([Says(0), Says(1)], LabelledImages(pixels, labels, 3, mean=(0.0,), std=(1.0,)))
    assert found.counts[0].tolist() == [[196, 0, 4], [0, 197, 3], [0, 0, 200]]
    assert found.counts[1].tolist() == [[4, 196, 0], [3, 0, 197], [200, 0, 0]]
    assert found.accuracy(0) == pytest.approx(593 / 600)
    assert found.shares(1)[0] == pytest.approx([0.02, 0.98, 0.0])
    # The second is right only on the four images of class 0 that look like 2, where the first is wrong.
    assert found.right.tolist() == [3, 597, 0]


def test_classes_without_images_have_no_share() -> None:
    pixels, labels = torch.zeros(5, 1, 2, 2, dtype=torch.uint8), torch.zeros(5, dtype=torch.int64)
    found = confusion([Says(0)], LabelledImages(pixels, labels, 3, mean=(0.0,), std=(1.0,)))
    assert found.shares(0) == [[1.0, 0.0, 0.0], [0.0] * 3, [0.0] * 3]


# --- page and plots --------------------------------------------------------------------------------------------------


def test_text_is_escaped_everywhere(tmp_path: Path) -> None:
    bad = "<b>&\"'"
    parts = (Table((bad,), ((bad,),)), Figures({bad: bad}), Folded(bad, Table((bad,), ())), Picture(b"", bad))
    write_page(tmp_path / "page.html", bad, bad, [Section(bad, bad, parts)], bad)
    page = (tmp_path / "page.html").read_text()
    assert "<b>" not in page and page.count("&lt;b&gt;&amp;") == 13


def matrices(K: int, C: int) -> list[ClassMatrix]:
    shares = torch.full((C, C), 0.1 / max(C - 1, 1)).fill_diagonal_(0.9).tolist()
    return [ClassMatrix(f"model {k}", shares) for k in range(K)]


@pytest.mark.parametrize("K", [1, 4, 5, 17])
def test_heat_maps_of_any_number_of_models(K: int) -> None:
    picture = confusions(matrices(K, 3))
    assert picture.svg.count(b"<image") == K + 1  # and the colour bar
    assert f"model {K - 1}." in picture.description
    assert b"<image" in class_accuracies(matrices(K, 100)).svg


@pytest.mark.parametrize("logarithmic", [False, True])
def test_curves_of_one_point_are_drawn(logarithmic: bool) -> None:
    one = Curve("one", "#000000", [[0.5]], x=[1.0])
    picture = curves([Panel("A", "y", [one], logarithmic), Panel("B", "y", [one, replace(one, label="two")])])
    assert picture.description == "Curves over epochs. A: one; B: one, two."
    assert picture.svg.startswith(b"<?xml")
