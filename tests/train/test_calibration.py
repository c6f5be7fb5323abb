"""The expected calibration error: a case computed by hand, and the value that evaluation reports."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from camkd_fast.train.trainer import BINS, calibration_bins, calibration_error, evaluate
from tests.support.training import CLASSES, ONE, SmallNet, images, loader


def logits_of(confidences: list[float]) -> Tensor:
    """Logits of two classes with the given probabilities of the first."""
    p = torch.tensor(confidences, dtype=torch.float64)
    return torch.stack([(p / (1 - p)).log(), torch.zeros_like(p)], 1)


def test_a_case_by_hand() -> None:
    # Bins of 1/15: 0.55 lies in (8/15, 9/15], 0.62 and 0.65 in (9/15, 10/15], 0.95 twice in (14/15, 1].
    confidences = [0.55, 0.62, 0.65, 0.95, 0.95]
    correct = torch.tensor([True, False, True, True, False])
    expected = (1 * abs(1.0 - 0.55) + 2 * abs(0.5 - 0.635) + 2 * abs(0.5 - 0.95)) / 5
    bins = calibration_bins(logits_of(confidences), correct)
    assert BINS == 15 and bins.shape == (2, 15)
    assert calibration_error(bins, 5) == pytest.approx(expected, abs=1e-6)
    # The bins of parts of a set add up.
    parts = sum(calibration_bins(logits_of(confidences[i : i + 2]), correct[i : i + 2]) for i in (0, 2, 4))
    assert calibration_error(parts, 5) == pytest.approx(expected, abs=1e-6)


def test_certainty_that_is_right_has_no_error_and_certainty_that_is_wrong_has_all() -> None:
    logits = torch.tensor([[1000.0, 0.0], [0.0, 1000.0]])
    for right, expected in ((True, 0.0), (False, 1.0)):
        bins = calibration_bins(logits, torch.full((2,), right))
        assert calibration_error(bins, 2) == expected
    assert calibration_error(torch.zeros(2, BINS), 0) == 0.0


def test_evaluation_tells_it() -> None:
    model, data = SmallNet(), images(70)
    with torch.no_grad():
        logits = model.eval()(data.normalise(data.pixels))
    confidence = logits.softmax(1).amax(1)
    error = 0.0
    for b in range(BINS):
        inside = (confidence > b / BINS) & (confidence <= (b + 1) / BINS)
        if inside.any():
            right = (logits.argmax(1) == data.labels)[inside].float().mean()
            error += float(inside.sum()) / 70 * abs(float(right - confidence[inside].mean()))
    assert evaluate(model, loader(data, 32, train=False), ONE).calibration == pytest.approx(error, abs=1e-6)


def test_equal_probabilities_are_calibrated_where_one_in_c_is_right() -> None:
    class Undecided(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(len(x), CLASSES)

    data = images(1000)
    found = evaluate(Undecided(), loader(data, 100, train=False), ONE)
    assert found.calibration == pytest.approx(abs(found.accuracy - 1 / CLASSES), abs=1e-6)
    assert found.loss == pytest.approx(math.log(CLASSES))
