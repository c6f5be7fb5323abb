"""The carrier of the formula's constants: checks, the operator's schema, the module's attributes."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from camkd_fast import CAMKDLoss, camkd_loss
from camkd_fast.losses.formula import Formula


def test_checked_makes_floats():
    formula = Formula(np.float64(2.0), 1, 3).checked()
    assert [type(value) for value in formula[:3]] == [float] * 3
    assert formula[:5] == (2.0, 1.0, 3.0, "confidence", -100)
    assert formula.is_basic() and formula == Formula(2.0, 1.0, 3.0)


@pytest.mark.parametrize("number", [np.float32, np.float64, np.int64, Fraction], ids=lambda kind: kind.__name__)
def test_numbers_equal_to_a_default_are_numbers_of_python(number):
    """A schedule in NumPy's numbers may come to 1 or 0."""
    settings = {"student_logit_scale": number(1), "z_loss_weight": number(0), "teacher_logit_scales": [number(1)] * 2}
    formula = Formula(**settings).checked(2)
    assert (type(formula.student_logit_scale), type(formula.z_loss_weight)) == (float, float)
    student, teachers, target = torch.randn(4, 5), list(torch.randn(2, 4, 5)), torch.arange(4)
    expected = camkd_loss(student, teachers, target, teacher_logit_scales=[1.0, 1.0]).loss
    assert torch.equal(camkd_loss(student, teachers, target, **settings).loss, expected)
    for name in ("student_logit_scale", "z_loss_weight"):
        one = camkd_loss(student, teachers, target, **{name: settings[name]}).loss
        assert torch.equal(one, camkd_loss(student, teachers, target).loss), name


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("forward_kl", "forward_kl"),
        (("jsd", 0), "forward_kl"),
        (["skew", np.float32(0.0)], "forward_kl"),
        ("reverse_kl", ("reverse_kl", 0.0)),
        (("jsd", 1), ("reverse_kl", 0.0)),
        (("jsd", 0.25), ("jsd", 0.25)),
        (("skew", np.float64(0.5)), ("skew", 0.5)),
    ],
    ids=str,
)
def test_a_divergence_has_one_form(given, expected):
    formula = Formula(divergence=given).checked()
    assert formula.divergence == expected and formula.checked() == formula
    assert formula.is_basic() == (expected == "forward_kl")


def test_at_temperature_1_the_factor_t2_makes_no_difference():
    assert Formula(1.0, scale_by_t2=False).checked().is_basic()
    assert not Formula(1.5, scale_by_t2=False).checked().is_basic()


def test_scales_and_softcaps_of_each_teacher():
    formula = Formula(
        student_logit_scale=2, teacher_logit_scales=[1, np.float32(0.5)], teacher_softcaps=(None, 30)
    ).checked(2)
    assert formula.student_map() == (2.0, 0.0)
    assert [formula.teacher_map(k) for k in range(2)] == [(1.0, 0.0), (0.5, 30.0)]
    assert formula.checked(2) == formula and not formula.is_basic()
    assert Formula().checked(3).teacher_map(2) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"temperature": 0.0}, ValueError, "temperature must be finite and > 0, got 0.0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be finite and > 0, got nan"),
        ({"hard_weight": float("inf")}, ValueError, "hard_weight must be finite, got inf"),
        ({"soft_weight": "1"}, TypeError, "soft_weight must be a number, got str"),
        ({"weighting": "trust"}, ValueError, "got 'trust'"),
        ({"ignore_index": True}, TypeError, "ignore_index must be an int, got bool"),
        ({"divergence": "kl"}, ValueError, r"divergence must be 'forward_kl', .*, got 'kl'"),
        ({"divergence": "jsd"}, ValueError, r"divergence 'jsd' needs its parameter in \[0, 1\]"),
        ({"divergence": ("jsd", 1.5)}, ValueError, r"the parameter of 'jsd' must be in \[0, 1\], got 1.5"),
        ({"divergence": ("skew", 1)}, ValueError, r"the parameter of 'skew' must be in \[0, 1\), got 1.0"),
        ({"divergence": ("skew", float("nan"))}, ValueError, "got nan"),
        ({"divergence": ("jsd", "half")}, TypeError, "the parameter of 'jsd' must be a number, got str"),
        ({"divergence": ("reverse_kl", 0.5)}, ValueError, "'reverse_kl' has no parameter"),
        ({"scale_by_t2": 1.5}, TypeError, "scale_by_t2 must be True or False, got float"),
        ({"z_loss_weight": float("inf")}, ValueError, "z_loss_weight must be finite, got inf"),
        ({"student_logit_scale": 0}, ValueError, "student_logit_scale must be finite and > 0, got 0"),
        ({"student_softcap": -1.0}, ValueError, "student_softcap must be finite and > 0, got -1.0"),
        ({"teacher_logit_scales": 2.0}, TypeError, "must be a sequence with a number per teacher, got float"),
        ({"teacher_logit_scales": [1.0, 2.0]}, ValueError, "holds 2 numbers, but there are 3 teachers"),
        ({"teacher_softcaps": (30.0, None, 0.0)}, ValueError, r"teacher_softcaps\[2\] must be finite and > 0, got 0.0"),
        ({"entropy": "yes"}, TypeError, "entropy must be True or False, got str"),
    ],
)
def test_errors_name_the_constant_and_its_value(changes, error, words):
    with pytest.raises(error, match=words):
        Formula(**changes).checked(3)


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
    assert again.soft_scale() == 2.0 * 9.0 and again.is_basic()


@pytest.mark.parametrize("divergence", ["reverse_kl", ("jsd", 0.3), "forward_kl"], ids=str)
def test_an_operators_schema_holds_what_is_beyond_the_paper(divergence):
    formula = Formula(
        divergence=divergence, scale_by_t2=False, z_loss_weight=0.1, student_softcap=5.0,
        teacher_logit_scales=(1.0, 2.0), teacher_softcaps=(None, 3.0), entropy=True,
    ).checked(2)  # fmt: skip
    again = Formula.from_constants(*formula.constants(), None).checked(2)
    assert again == formula


def test_attributes_of_the_module_may_change_between_calls():
    criterion = CAMKDLoss(temperature=4.0)
    logits, teachers, target = torch.randn(4, 10), [torch.randn(4, 10)] * 2, torch.tensor([1, 7, 2, 0])
    criterion.temperature = 2.0
    expected = camkd_loss(logits, teachers, target, temperature=2.0).loss
    assert torch.equal(criterion(logits, teachers, target).loss, expected)
    assert "temperature=2.0" in repr(criterion) and "weighting=confidence" in repr(criterion)
