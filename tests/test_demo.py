"""The demonstration's parts, models, data, strategies and loop, and a short run of the whole."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camkd_fast import camkd_loss
from camkd_fast.baselines import eager_loss
from camkd_fast.data import LabelledImages, ResidentBatches, corrupt_labels, stratified_parts
from camkd_fast.train.config import TrainConfig
from camkd_fast.train.loop import NonFiniteLossError, accuracy, fit
from camkd_fast.train.strategies import CAMKD, HardLabels, LogitDistillation
from camkd_fast.train.teachers import ImageTeachers as Teachers

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from camkd_fast.data.digits import DigitSplits, load_digits
from camkd_fast.train import demo, demo_report


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second thread and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits() -> DigitSplits:
    return load_digits()


def test_a_model_without_the_protocol_is_refused() -> None:
    with pytest.raises(TypeError, match="Linear cannot teach"):
        Teachers([nn.Linear(2, 2)])


def test_split_is_disjoint_stratified_and_repeatable(digits: DigitSplits) -> None:
    def keys(images: LabelledImages) -> set[bytes]:
        return {pixels.numpy().tobytes() for pixels in images.pixels}

    assert [len(part) for part in digits] == [900, 300, 597]
    # All 1797 images differ, so their bytes identify them.
    assert len(keys(digits.train) | keys(digits.validation) | keys(digits.test)) == 1797
    for part in digits:
        share = part.labels.bincount(minlength=10) / len(part)
        total = sum(p.labels.bincount(minlength=10) for p in digits) / 1797
        assert (share - total).abs().max() * len(part) <= 2
    again, other = load_digits(), load_digits(seed=1)
    assert torch.equal(again.test.pixels, digits.test.pixels)
    assert not torch.equal(other.test.pixels, digits.test.pixels)


def test_smaller_parts_are_nested_and_excess_is_refused() -> None:
    labels = torch.arange(40) % 4
    (few,), (many,) = stratified_parts(labels, [8], seed=3), stratified_parts(labels, [20], seed=3)
    assert torch.equal(many[:8], few)
    assert labels[few].bincount().tolist() == [2, 2, 2, 2]
    with pytest.raises(ValueError, match=r"41.*40"):
        stratified_parts(labels, [40, 1], seed=0)


@pytest.mark.parametrize("fraction", [0.0, 0.35, 1.0])
def test_corrupted_labels_are_wrong_in_exactly_that_share(fraction: float) -> None:
    labels = torch.arange(200) % 10
    corrupted = corrupt_labels(labels, 10, fraction, seed=0)
    assert int((corrupted != labels).sum()) == round(200 * fraction)
    assert corrupted.min() >= 0 and corrupted.max() < 10
    assert torch.equal(corrupted, corrupt_labels(labels, 10, fraction, seed=0))


def test_batches_cover_every_image_once_in_a_new_order_per_epoch_and_seed(digits: DigitSplits) -> None:
    data = replace(digits.train.take(torch.arange(70)), labels=torch.arange(70))

    def order(seed: int, epoch: int) -> Tensor:
        batches = ResidentBatches(data, 32, seed, shift=1)
        batches.set_epoch(epoch)
        assert len(batches) == 3
        return torch.cat([target for _, target in batches])

    first = order(0, 1)
    assert torch.equal(first.sort().values, torch.arange(70))
    assert torch.equal(first, order(0, 1))
    assert not torch.equal(first, order(0, 2)) and not torch.equal(first, order(1, 1))


def test_shift_moves_by_at_most_one_pixel_and_fills_with_background() -> None:
    pixels = torch.zeros(500, 1, 8, 8, dtype=torch.uint8)
    pixels[:, :, 3, 4] = 16
    data = LabelledImages(pixels, torch.zeros(500, dtype=torch.int64), 10, mean=(0.0,), std=(1.0,))
    images = torch.cat([batch for batch, _ in ResidentBatches(data, 64, seed=0, shift=1)])
    where = images.flatten(1).argmax(1)
    assert torch.equal(images.flatten(1).sum(1), torch.full((500,), 16.0))
    assert set(where.tolist()) == {8 * (3 + dy) + 4 + dx for dy in (-1, 0, 1) for dx in (-1, 0, 1)}


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


@pytest.fixture(scope="module")
def teachers(digits: DigitSplits) -> Teachers:
    """A fair one and one that learned wrong labels only."""
    right = demo.first_images(digits.train, 200)
    wrong = replace(right, labels=corrupt_labels(right.labels, 10, 1.0, seed=0))
    trained = []
    for data in (right, wrong):
        model = demo.seeded_model("resnet8", data, seed=0)
        fit(model, HardLabels(), data, right, TrainConfig(epochs=8, seed=0, batch_size=20, shift=0))
        trained.append(model)
    return Teachers(trained)


def test_poor_teacher_gets_less_weight_while_a_student_trains(teachers: Teachers, digits: DigitSplits) -> None:
    student = demo.seeded_model("resnet8", digits.train, seed=1)
    strategy = CAMKD(teachers, student.num_features)
    few = demo.first_images(digits.train, 110)
    history = fit(student, strategy, few, few, TrainConfig(epochs=3, seed=1, batch_size=20, shift=0))
    fair, poor = history.epochs[-1].weights
    assert poor < 0.3 < 0.7 < fair
    assert sum(history.epochs[-1].feature_weights) == pytest.approx(1.0, abs=1e-4)
    assert history.images == 3 * 110
    assert history.epochs[-1].train_accuracy > history.epochs[0].train_accuracy


def test_training_leaves_teachers_alone_and_moves_what_the_strategy_owns(
    teachers: Teachers, digits: DigitSplits
) -> None:
    few = digits.train.take(torch.arange(40))
    images = few.normalise(few.pixels)
    before = [prediction.logits.clone() for prediction in teachers(images)]
    student = demo.seeded_model("resnet8", few, seed=1)
    strategy = CAMKD(teachers, student.num_features)
    owned = [p.detach().clone() for p in strategy.parameters()]
    assert len(owned) == 2 * 3  # per teacher: convolution, scale and offset of the batch norm
    fit(student, strategy, few, few, TrainConfig(epochs=1, seed=0, batch_size=20))
    assert all(not torch.equal(old, new) for old, new in zip(owned, strategy.parameters(), strict=True))
    for old, prediction in zip(before, teachers(images), strict=True):
        assert torch.equal(old, prediction.logits)
        assert not prediction.logits.requires_grad


def test_strategies_agree_with_their_formulas(teachers: Teachers, digits: DigitSplits) -> None:
    few = digits.train.take(torch.arange(16))
    taught = teachers(few.normalise(few.pixels))
    student = taught[0]._replace(logits=torch.randn(16, 10), features=torch.randn_like(taught[0].features))
    log_q = F.log_softmax(student.logits / 4, 1)
    divergence = [F.kl_div(log_q, F.softmax(t.logits / 4, 1), reduction="none").sum(1) for t in taught]
    hard = F.cross_entropy(student.logits, few.labels)
    assert torch.equal(HardLabels()(student, [], few.labels).loss, hard)
    aver = LogitDistillation(teachers, "uniform", alpha=0.5)(student, taught, few.labels)
    torch.testing.assert_close(aver.loss, hard + 0.5 * 16 * torch.stack(divergence).mean(0).mean())
    logits_only = LogitDistillation(teachers, "confidence")(student, taught, few.labels)
    full = CAMKD(teachers, student.features.shape[1], beta=0.0)(student, taught, few.labels)
    torch.testing.assert_close(full.loss, logits_only.loss)


def test_training_repeats_exactly_and_differs_by_seed(digits: DigitSplits) -> None:
    few = digits.train.take(torch.arange(100))

    def trained(seed: int) -> nn.Module:
        model = demo.seeded_model("resnet8", few, seed)
        fit(model, HardLabels(), few, few, TrainConfig(epochs=1, seed=seed))
        return model

    images = few.normalise(few.pixels)
    first, again, other = (trained(seed)(images) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_divergence_stops_the_run_with_a_reason(digits: DigitSplits) -> None:
    few = digits.train.take(torch.arange(40))
    broken = replace(few, mean=(float("nan"),))
    with pytest.raises(NonFiniteLossError, match="epoch 1 is nan"):
        fit(demo.seeded_model("resnet8", few, 0), HardLabels(), broken, few, TrainConfig(epochs=2, seed=0))


@pytest.mark.parametrize(
    "bad", [{"epochs": 0}, {"epochs": 1, "batch_size": 0}, {"epochs": 1, "learning_rate": float("nan")}]
)
def test_unfit_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        TrainConfig(seed=0, **bad)  # type: ignore[arg-type]


def test_accuracy_counts_every_image(digits: DigitSplits) -> None:
    class Always(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.one_hot(torch.full((len(x),), 3), 10).float()

    share = (digits.test.labels == 3).double().mean().item()
    assert accuracy(Always(), digits.test, batch_size=100) == pytest.approx(share)


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
    results = demo.run(config)
    page = demo_report.write(results, tmp_path, {"torch": torch.__version__}).read_text()
    written = json.loads((tmp_path / "metrics.json").read_text())

    assert [s["strategy"] for s in written["students"]] == ["CE only", "AVER", "CA-MKD"]
    assert all(0 <= s["test_accuracy"]["mean"] <= 1 for s in written["students"])
    weights = torch.tensor(written["confidence_weights"])
    assert weights.shape == (3, 40)
    torch.testing.assert_close(weights.sum(0), torch.ones(40), rtol=0, atol=1e-4)
    assert set(written["loss_speed"]["milliseconds"]) == {"fused", "eager"}

    assert page.count('<img alt="') == 4 and page.count("<table>") == 3
    assert not re.search(r"""(src|href)=["'](?!data:)""", page) and "<script" not in page
    text = demo_report.summary(results)
    for expected in ("poor teacher (resnet20)", "CE only", "AVER", "CA-MKD", "images/s", "eager"):
        assert expected in text and expected in page
