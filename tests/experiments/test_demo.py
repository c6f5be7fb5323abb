"""The demonstration: its parts, its data, its baseline, and a short complete run."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from camkd_fast import camkd_loss
from camkd_fast.data import ImageSet, LabelledImages, Splits, corrupt_labels, stratified_parts
from camkd_fast.data.images import swap_labels
from camkd_fast.losses.eager import eager_loss
from camkd_fast.train.journal import METRICS, read_metrics

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from camkd_fast.data.digits import load_digits
from camkd_fast.experiments import demo, demo_report
from camkd_fast.train import run, run_images
from camkd_fast.train.config import DataConfig

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits() -> Splits:
    return load_digits()


def test_split_is_disjoint_stratified_and_repeatable(digits: Splits) -> None:
    def keys(images: ImageSet) -> set[bytes]:
        assert isinstance(images, LabelledImages)
        return {pixels.numpy().tobytes() for pixels in images.pixels}

    assert [len(part) for part in digits] == [900, 300, 597]
    # All 1797 images differ, so their bytes identify them.
    assert len(keys(digits.train) | keys(digits.validation) | keys(digits.test)) == 1797
    for part in digits:
        share = part.labels.bincount(minlength=10) / len(part)
        total = sum(p.labels.bincount(minlength=10) for p in digits) / 1797
        assert (share - total).abs().max() * len(part) <= 2
    again, other = load_digits(), load_digits(seed=1)
    assert again.test.fingerprint() == digits.test.fingerprint() != other.test.fingerprint()


def test_smaller_parts_are_nested_and_excess_is_refused() -> None:
    labels = torch.arange(40) % 4
    (few,), (many,) = stratified_parts(labels, [8], seed=3), stratified_parts(labels, [20], seed=3)
    assert torch.equal(many[:8], few)
    assert labels[few].bincount().tolist() == [2, 2, 2, 2]
    with pytest.raises(ValueError, match=r"41.*40"):
        stratified_parts(labels, [40, 1], seed=0)


def test_swapped_classes_change_places_and_nothing_else() -> None:
    labels = torch.tensor([0, 3, 5, 3, 9, 5, 1])
    assert swap_labels(labels, 10, 3, 5).tolist() == [0, 5, 3, 5, 9, 3, 1]
    assert labels.tolist() == [0, 3, 5, 3, 9, 5, 1]
    with pytest.raises(ValueError, match=r"\[0, 10\), got 3 and 10"):
        swap_labels(labels, 10, 3, 10)


@pytest.mark.parametrize("fraction", [0.0, 0.35, 1.0])
def test_corrupted_labels_are_wrong_in_exactly_that_share(fraction: float) -> None:
    labels = torch.arange(200) % 10
    corrupted = corrupt_labels(labels, 10, fraction, seed=0)
    assert int((corrupted != labels).sum()) == round(200 * fraction)
    assert corrupted.min() >= 0 and corrupted.max() < 10
    assert torch.equal(corrupted, corrupt_labels(labels, 10, fraction, seed=0))


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_corrupted_labels_are_any_other_class(classes: int) -> None:
    labels = torch.arange(4000) % classes
    offsets = (corrupt_labels(labels, classes, 1.0, seed=0) - labels) % classes
    assert set(offsets.tolist()) == set(range(1, classes))
    assert set(((corrupt_labels(labels, classes, 1.0, 0, neighbour=True) - labels) % classes).tolist()) == {1}


def test_baseline_computes_the_same_loss_and_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    student, *teachers = (4 * torch.randn(4, 33, 50, generator=generator)).unbind()
    target = torch.randint(50, (33,), generator=generator)
    student = student.requires_grad_()
    ours = camkd_loss(student, teachers, target, temperature=3.0, hard_weight=0.5, soft_weight=2.0).loss
    theirs = eager_loss(student, teachers, target, temperature=3.0, hard_weight=0.5, soft_weight=2.0)
    torch.testing.assert_close(ours, theirs)
    (our_gradient,), (their_gradient,) = (torch.autograd.grad(loss, student) for loss in (ours, theirs))
    assert (our_gradient - their_gradient).norm() <= 1e-5 * their_gradient.norm()


def test_poor_teacher_gets_less_weight_while_a_student_trains(tmp_path: Path) -> None:
    """A fair teacher, one trained on mostly wrong labels, and the student of both, from the demonstration's runs."""
    fair = demo.DemoTeacher("fair", "resnet8", epochs=8, images=200, augmentation="none")
    config = demo.DemoConfig(
        teachers=(fair, replace(fair, name="poor", wrong_labels=0.95)),
        student_images=110,
        student_epochs=3,
        batch_size=20,
        beta=50.0,
    )
    for k in range(2):
        run.teach(config.teacher(k, tmp_path))
    cell = config.students(tmp_path).cell("ca-mkd", 1)
    run.distill(cell)
    epochs = read_metrics(cell.out / METRICS, "epoch")
    fair_weight, poor_weight = epochs[-1]["weights"]
    assert poor_weight < 0.3 < 0.7 < fair_weight
    assert sum(epochs[-1]["feature_weights"]) == pytest.approx(1.0, abs=1e-4)
    assert epochs[-1]["train_accuracy"] > epochs[0]["train_accuracy"]

    # The logged mean of the last epoch is over the same images without augmentation, so it must be equal.
    parts = run_images.load_splits(DataConfig(data=demo.DATA))
    weights = demo.teacher_weights(list(map(Path, cell.teachers)), parts.train, 110)
    assert weights.shape == (2, 110)
    torch.testing.assert_close(weights.mean(1), torch.tensor(epochs[-1]["weights"]), rtol=5e-4, atol=0)


def test_short_demo_writes_page_and_metrics(tmp_path: Path) -> None:
    default = demo.DemoConfig()
    config = replace(
        default,
        teachers=tuple(replace(spec, epochs=1, images=60) for spec in default.teachers),
        student_images=40,
        student_epochs=1,
        seeds=(0,),
        speed_shape=(16, 20, 3),
        compiled=False,
    )
    results = demo.run_demo(config, tmp_path)
    page = demo_report.write(results, tmp_path, {"torch": torch.__version__}).read_text()
    written = json.loads((tmp_path / "metrics.json").read_text())

    assert [s["strategy"] for s in written["students"]] == ["CE only", "AVER", "CA-MKD"]
    assert all(0 <= s["test_accuracy"]["mean"] <= 1 for s in written["students"])
    weights = torch.tensor(written["confidence_weights"])
    assert weights.shape == (3, 40)
    torch.testing.assert_close(weights.sum(0), torch.ones(40), rtol=1e-4, atol=0)
    assert set(written["loss_speed"]["milliseconds"]) == {"fused", "eager"}

    assert page.count('<img alt="') == 4 and page.count("<table>") == 3
    assert not re.search(r"""(src|href)=["'](?!data:)""", page) and "<script" not in page
    text = demo_report.summary(results)
    for expected in ("poor teacher (resnet20)", "CE only", "AVER", "CA-MKD", "images/s", "eager"):
        assert expected in text and expected in page

    again = demo.run_demo(config, tmp_path)  # replaces the runs and gives the same results
    assert [row.test_accuracy for row in again.students] == [row.test_accuracy for row in results.students]
