"""The carrier of the formula's constants: checks, the operator's schema, the module's attributes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from camkd_fast import CAMKDLoss, camkd_loss
from camkd_fast.losses.formula import Formula


def test_checked_makes_floats():
    formula = Formula(np.float64(2.0), 1, 3).checked()
    assert [type(value) for value in formula[:3]] == [float] * 3
    assert formula == (2.0, 1.0, 3.0, "confidence", -100)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"temperature": 0.0}, ValueError, "temperature must be finite and > 0, got 0.0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be finite and > 0, got nan"),
        ({"hard_weight": float("inf")}, ValueError, "hard_weight must be finite, got inf"),
        ({"soft_weight": "1"}, TypeError, "soft_weight must be a number, got str"),
        ({"weighting": "trust"}, ValueError, "got 'trust'"),
        ({"ignore_index": True}, TypeError, "ignore_index must be an int, got bool"),
    ],
)
def test_errors_name_the_constant_and_its_value(changes, error, words):
    with pytest.raises(error, match=words):
        Formula(**changes).checked()


def test_options_are_keywords_of_the_loss():
    formula = Formula(3.0, 0.5, 2.0, "entropy", 7)
    logits, target = torch.randn(4, 10), torch.tensor([1, 7, 2, 0])
    out = camkd_loss(logits, [logits + 1, logits * 2], target, **formula.options())
    assert out.weights[:, 1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("weighting", ["uniform", torch.rand(3, 4)], ids=["name", "tensor"])
def test_an_operators_schema_holds_all_of_it(weighting):
    formula = Formula(3.0, 0.5, 2.0, weighting, 7)
    weights = weighting if isinstance(weighting, torch.Tensor) else None
    again = Formula.from_constants(*formula.constants(), weights)
    assert again[:3] == formula[:3] and again.ignore_index == 7 and again.weighting is weighting
    assert again.soft_scale == 2.0 * 9.0


def test_attributes_of_the_module_may_change_between_calls():
    criterion = CAMKDLoss(temperature=4.0)
    logits, teachers, target = torch.randn(4, 10), [torch.randn(4, 10)] * 2, torch.tensor([1, 7, 2, 0])
    criterion.temperature = 2.0
    expected = camkd_loss(logits, teachers, target, temperature=2.0).loss
    assert torch.equal(criterion(logits, teachers, target).loss, expected)
    assert "temperature=2.0" in repr(criterion) and "weighting=confidence" in repr(criterion)
