"""A strategy that is registered at run time works in every command and appears in every report."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from camkd_fast import cli
from camkd_fast.experiments import run_report
from camkd_fast.experiments.study import records, spec
from camkd_fast.experiments.study.findings import Findings
from camkd_fast.experiments.study.study_tables import accuracy_by_pool, calibration, cost, overview
from camkd_fast.models.protocol import Prediction
from camkd_fast.train import run, strategies
from camkd_fast.train.config import DataConfig, LogConfig, OptimConfig, TeachConfig
from camkd_fast.train.config_file import serializable
from camkd_fast.train.strategies import Strategy
from tests.support.study_parts import study

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = "--data digits --images 60 --epochs 2 --no-progress --no-tensorboard"


class LeastLoss(Strategy):
    """Per sample, all weight on the teacher with the lowest cross-entropy."""

    name, label, color = "least-loss", "Least loss", "#117733"
    unweighted = "aver"

    def weighting(self, student_logits: Tensor, teacher_outputs: list[Prediction], target: Tensor) -> Tensor:
        losses = torch.stack([F.cross_entropy(t.logits.float(), target, reduction="none") for t in teacher_outputs])
        return F.one_hot(losses.argmin(0), len(losses)).T.float()


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    strategies.register(LeastLoss)
    yield
    strategies.unregister(LeastLoss.name)
    assert LeastLoss.name not in strategies.names()


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("teachers")
    for k in range(2):
        data, log = DataConfig(images=60), LogConfig(tensorboard=False, progress=False)
        run.teach(TeachConfig("resnet8", k, folder / f"t{k}", data=data, optim=OptimConfig(epochs=1), log=log))
    return f"{folder / 't0'} {folder / 't1'}"


def test_distill_and_report_know_it(tmp_path: Path, teachers: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"distill --student resnet8 --teachers {teachers} --strategy least-loss {OPTIONS} --out {tmp_path}"
    assert cli.main(line.split()) == 0
    assert "least-loss" in run_report.write(tmp_path, {}).read_text()
    with pytest.raises(SystemExit):
        cli.main(["distill", "--help"])
    assert ", ca-mkd, least-loss." in " ".join(capsys.readouterr().out.replace("│", "").split())


def test_compare_reaches_the_finished_page(tmp_path: Path, teachers: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"compare --student resnet8 --teachers {teachers} --strategies aver least-loss --seeds 0 1 {OPTIONS}"
    assert cli.main([*line.split(), "--beta", "5", "--uniform", "logits", "--out", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert LeastLoss.label in table and "AVER" in table
    page = (tmp_path / "report.html").read_text()
    assert LeastLoss.label in page and "Difference to AVER" in page


@pytest.mark.slow
def test_a_study_reaches_its_report(tmp_path: Path) -> None:
    small = study()
    variants = (small.variant("aver"), spec.Variant(LeastLoss.name, LeastLoss.name))
    small = replace(small, pools=small.pools[:1], teachers=small.teachers[:2], variants=variants)
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(serializable(small)))
    assert cli.main(["compare", "--study", str(file), "--out", str(tmp_path / "out"), "--jobs", "1"]) == 0

    done = records.read(small, tmp_path / "out" / "results.jsonl")
    assert len(done.cells) == 4 and not done.missing
    page = html.unescape((tmp_path / "out" / "report.html").read_text())
    conclusions, accuracy = page.index("Conclusions"), page.index("Test accuracy</h2>")
    assert f"{LeastLoss.label} (" in page[conclusions:accuracy]  # the verdict
    assert f"{LeastLoss.label} minus AVER" in page[conclusions:accuracy]  # the value of its weights
    findings = Findings(done)
    for table in (
        overview(findings),
        accuracy_by_pool(findings, small.students[0]),
        calibration(findings),
        cost(findings),
    ):
        assert LeastLoss.label in [row[0] for row in table.rows]


def test_registration_is_checked() -> None:
    class Unnamed(Strategy):
        label = "Unnamed"

    with pytest.raises(TypeError, match="strategy Unnamed lacks name, color"):
        strategies.register(Unnamed)

    class Twin(LeastLoss):
        """Inherits the name."""

    with pytest.raises(ValueError, match="Twin and LeastLoss are both named 'least-loss'"):
        strategies.register(Twin)
    assert strategies.register(LeastLoss) is LeastLoss
    with pytest.raises(TypeError, match="no strategy has an option 'gamma'"):
        strategies.create("aver", None, 4, gamma=1.0)
