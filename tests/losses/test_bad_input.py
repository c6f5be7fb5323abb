"""Bad input: a one-line ValueError or TypeError that names both values, raised before any work."""

import re

import numpy
import pytest
import torch

from camkd_fast import (
    CAMKDFeatureLoss,
    CAMKDLoss,
    camkd_feature_loss_and_grad,
    camkd_loss,
    camkd_loss_and_grad,
    confidence_weights,
    weighted_feature_loss,
)
from camkd_fast.backends.dispatch import explain

META = torch.device("meta")


def arguments(**changes):
    return {
        "student_logits": torch.randn(4, 10, requires_grad=True),
        "teacher_logits": [torch.randn(4, 10) for _ in range(3)],
        "target": torch.tensor([1, 2, 3, 9]),
    } | changes


def teachers(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(shape) for shape in shapes]


def second(second_target=None, mix=None):
    """Second labels of which one is wrong."""
    return {
        "second_target": torch.tensor([4, 3, 2, 1]) if second_target is None else second_target,
        "mix": torch.tensor([0.0, 0.25, 0.5, 1.0]) if mix is None else mix,
    }


# Mistake: changed arguments, type of the error, fragments of its message.
BAD = {
    "class count": ({"teacher_logits": teachers((4, 10), (4, 12))}, ValueError, ["teacher_logits[1]", "12", "10"]),
    "rows": ({"teacher_logits": teachers((4, 10), (5, 10))}, ValueError, ["teacher_logits[1]", "(5, 10)", "(4, 10)"]),
    "dimensions": ({"teacher_logits": teachers((2, 2, 10))}, ValueError, ["(2, 2, 10)", "(4, 10)"]),
    "scalar teacher": ({"teacher_logits": [torch.tensor(1.0)]}, ValueError, ["teacher_logits[0]", "none", "10"]),
    "no teacher": ({"teacher_logits": []}, ValueError, ["1 to 16", "got 0"]),
    "no teacher in one tensor": ({"teacher_logits": torch.randn(0, 4, 10)}, ValueError, ["1 to 16", "got 0"]),
    "17 teachers": ({"teacher_logits": teachers(*[(4, 10)] * 17)}, ValueError, ["1 to 16", "got 17"]),
    "teachers no sequence": ({"teacher_logits": 3.0}, TypeError, ["teacher_logits", "sequence", "float"]),
    "teachers a generator": ({"teacher_logits": iter(teachers((4, 10)))}, TypeError, ["sequence", "iterator"]),
    "teacher no tensor": ({"teacher_logits": [numpy.zeros((4, 10))]}, TypeError, ["teacher_logits[0]", "ndarray"]),
    "integer teacher": ({"teacher_logits": [torch.ones(4, 10, dtype=torch.int32)]}, TypeError, ["floating", "int32"]),
    "teacher requires grad": (
        {"teacher_logits": [torch.randn(4, 10, requires_grad=True)]},
        ValueError,
        ["[0]", "grad"],
    ),
    "one-dimensional teachers tensor": ({"teacher_logits": torch.randn(10)}, ValueError, ["(K, ..., C)", "(10,)"]),
    "student no tensor": ({"student_logits": [1.0]}, TypeError, ["student_logits", "list"]),
    "integer student": ({"student_logits": torch.ones(4, 10, dtype=torch.int64)}, TypeError, ["floating", "int64"]),
    "boolean student": ({"student_logits": torch.ones(4, 10, dtype=torch.bool)}, TypeError, ["floating", "bool"]),
    "complex student": (
        {"student_logits": torch.ones(4, 10, dtype=torch.cfloat)},
        TypeError,
        ["floating", "complex64"],
    ),
    "scalar student": ({"student_logits": torch.tensor(1.0)}, ValueError, ["C >= 1", "()"]),
    "no classes": (
        {"student_logits": torch.ones(4, 0), "teacher_logits": teachers((4, 0))},
        ValueError,
        ["C >= 1", "(4, 0)"],
    ),
    "float target": ({"target": torch.ones(4)}, TypeError, ["int64", "float32"]),
    "int32 target": ({"target": torch.ones(4, dtype=torch.int32)}, TypeError, ["int64", "int32"]),
    "target no tensor": ({"target": [1, 2, 3, 9]}, TypeError, ["target", "list"]),
    "target length": ({"target": torch.tensor([1, 2])}, ValueError, ["(2,)", "(4,)"]),
    "one-hot target": ({"target": torch.zeros(4, 10, dtype=torch.int64)}, ValueError, ["(4, 10)", "(4,)"]),
    "label C": ({"target": torch.tensor([1, 2, 3, 10])}, ValueError, ["label 10", "10 classes"]),
    "label beyond C": ({"target": torch.tensor([1, 2**40, 3, 4])}, ValueError, [f"label {2**40}", "10 classes"]),
    "negative label": ({"target": torch.tensor([1, -1, 3, 4])}, ValueError, ["label -1", "10 classes", "-100"]),
    "default ignored label": (
        {"target": torch.tensor([-100, 1, 2, 3]), "ignore_index": -1},
        ValueError,
        ["-100", "-1"],
    ),
    "one of two": ({"second_target": torch.tensor([1, 2, 3, 4])}, ValueError, ["mix is None", "second_target"]),
    "other of two": ({"mix": torch.rand(4)}, ValueError, ["second_target is None", "mix"]),
    "second target float": (second(torch.ones(4)), TypeError, ["second_target", "int64", "float32"]),
    "second target length": (second(torch.tensor([1, 2])), ValueError, ["second_target", "(2,)", "(4,)"]),
    "mix integer": (second(mix=torch.ones(4, dtype=torch.int64)), TypeError, ["mix", "floating", "int64"]),
    "mix a number": (second(mix=0.5), TypeError, ["mix", "tensor", "float"]),
    "mix length": (second(mix=torch.rand(1)), ValueError, ["mix", "(1,)", "(4,)"]),
    "mix requires grad": (second(mix=torch.rand(4, requires_grad=True)), ValueError, ["mix", "grad"]),
    "second label C": (second(torch.tensor([1, 2, 10, 4])), ValueError, ["second_target", "label 10", "10 classes"]),
    "negative second label": (second(torch.tensor([1, -1, 3, 4])), ValueError, ["second_target", "label -1", "-100"]),
    "ignored second label": (second(torch.tensor([1, -100, 3, 4])), ValueError, ["second_target", "label -100"]),
    "ignored class as second label": (
        second(torch.tensor([1, 7, 3, 4])) | {"ignore_index": 7},
        ValueError,
        ["second_target", "label 7", "ignore_index is 7"],
    ),
    "share above 1": (second(mix=torch.tensor([0, 0.5, 1.5, 1])), ValueError, ["mix", "1.5", "[0, 1]"]),
    "share below 0": (second(mix=torch.tensor([0, 0.5, -0.5, 1])), ValueError, ["mix", "-0.5", "[0, 1]"]),
    "share NaN": (second(mix=torch.tensor([0, 0.5, float("nan"), 1])), ValueError, ["mix", "nan", "[0, 1]"]),
    "second target on another device": (
        second(torch.ones(4, dtype=torch.int64, device=META)),
        ValueError,
        ["second_target", "meta", "cpu"],
    ),
    "mix on another device": (second(mix=torch.ones(4, device=META)), ValueError, ["mix", "meta", "cpu"]),
    "temperature 0": ({"temperature": 0}, ValueError, ["temperature", "> 0", "got 0"]),
    "temperature below 0": ({"temperature": -4.0}, ValueError, ["temperature", "> 0", "-4.0"]),
    "temperature NaN": ({"temperature": float("nan")}, ValueError, ["temperature", "finite", "nan"]),
    "temperature infinite": ({"temperature": float("inf")}, ValueError, ["temperature", "finite", "inf"]),
    "temperature a string": ({"temperature": "4"}, TypeError, ["temperature", "number", "str"]),
    "temperature a tensor": ({"temperature": torch.tensor(4.0)}, TypeError, ["temperature", "number", "Tensor"]),
    "hard_weight NaN": ({"hard_weight": float("nan")}, ValueError, ["hard_weight", "finite", "nan"]),
    "soft_weight infinite": ({"soft_weight": float("-inf")}, ValueError, ["soft_weight", "finite", "-inf"]),
    "soft_weight None": ({"soft_weight": None}, TypeError, ["soft_weight", "number", "NoneType"]),
    "unknown weighting": ({"weighting": "mean"}, ValueError, ["'confidence'", "'entropy'", "'mean'"]),
    "weighting None": ({"weighting": None}, ValueError, ["weighting", "None"]),
    "weights shape": ({"weighting": torch.ones(4)}, ValueError, ["(4,)", "3 teachers", "(3,)", "(3, 4)"]),
    "weights transposed": ({"weighting": torch.ones(4, 3)}, ValueError, ["(4, 3)", "(3, 4)"]),
    "integer weights": ({"weighting": torch.ones(3, dtype=torch.int64)}, TypeError, ["weighting", "int64"]),
    "weights a list": ({"weighting": [0.2, 0.3, 0.5]}, ValueError, ["weighting", "[0.2, 0.3, 0.5]"]),
    "unknown reduction": ({"reduction": "avg"}, ValueError, ["'mean'", "'none'", "'avg'"]),
    "ignore_index a float": ({"ignore_index": -100.0}, TypeError, ["ignore_index", "int", "float"]),
    "ignore_index None": ({"ignore_index": None}, TypeError, ["ignore_index", "int", "NoneType"]),
    "num_items 0": ({"num_items": 0}, ValueError, ["num_items", "> 0", "got 0"]),
    "num_items with sum": ({"num_items": 4, "reduction": "sum"}, ValueError, ["num_items", "'mean'", "'sum'"]),
    "num_items of two": ({"num_items": torch.ones(2)}, ValueError, ["num_items", "one element", "(2,)"]),
    "num_items negative": ({"num_items": torch.tensor(-3.0)}, ValueError, ["num_items", "at least 0", "-3.0"]),
    "num_items NaN": ({"num_items": torch.tensor([float("nan")])}, ValueError, ["num_items", "at least 0", "nan"]),
    "num_items infinite": ({"num_items": torch.tensor(float("inf"))}, ValueError, ["num_items", "finite", "inf"]),
    "num_items bfloat16": ({"num_items": torch.ones(1).bfloat16()}, TypeError, ["num_items", "bfloat16", "float32"]),
    "num_items float16": ({"num_items": torch.ones(()).half()}, TypeError, ["num_items", "float16", "float32"]),
    "num_items a string": ({"num_items": "4"}, TypeError, ["num_items", "number", "str"]),
    "unknown backend": ({"backend": "fastest"}, ValueError, ["'reference'", "'cpu'", "'fastest'"]),
    "student on another device": (
        {"student_logits": torch.ones(4, 10, device=META)},
        ValueError,
        ["teacher_logits[0]", "cpu", "meta"],
    ),
    "teacher on another device": (
        {"teacher_logits": [torch.ones(4, 10, device=META)]},
        ValueError,
        ["teacher_logits[0]", "meta", "cpu"],
    ),
    "target on another device": (
        {"target": torch.ones(4, dtype=torch.int64, device=META)},
        ValueError,
        ["target", "meta", "cpu"],
    ),
    "weights on another device": ({"weighting": torch.ones(3, device=META)}, ValueError, ["weighting", "meta", "cpu"]),
}


def refuse(function, error, fragments, *args, **kwargs) -> None:
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    assert caught.type is error
    message = str(caught.value)
    assert "\n" not in message and len(message) < 200
    assert all(fragment in message for fragment in fragments), message


@pytest.mark.parametrize("entry", [camkd_loss, camkd_loss_and_grad], ids=lambda f: f.__name__)
@pytest.mark.parametrize("what", BAD)
def test_logit_loss(what, entry, backend):
    changes, error, fragments = BAD[what]
    given = {"backend": backend} | arguments(**changes)
    tensors = [given["student_logits"], *given["teacher_logits"]] if isinstance(given["teacher_logits"], list) else []
    tensors = [x for x in tensors if isinstance(x, torch.Tensor) and x.device.type == "cpu"]
    before = [x.detach().clone() for x in tensors]
    refuse(entry, error, fragments, **given)
    for x, old in zip(tensors, before, strict=True):
        assert torch.equal(x.detach(), old) and x.grad is None


@pytest.mark.parametrize(
    ("loss_scale", "error"), [(float("nan"), ValueError), ("1", TypeError), (torch.ones(2), ValueError)], ids=str
)
def test_loss_scale(loss_scale, error, backend):
    refuse(camkd_loss_and_grad, error, ["loss_scale"], **arguments(), loss_scale=loss_scale, backend=backend)


def test_labels_are_checked_even_where_no_loss_needs_them(backend):
    given = arguments(target=torch.tensor([1, 2, 3, 77]), hard_weight=0.0, weighting="uniform")
    refuse(camkd_loss, ValueError, ["label 77", "10 classes"], **given, backend=backend)


def test_a_backend_that_cannot_run_says_why():
    given = arguments()
    refuse(camkd_loss, NotImplementedError, ["'cuda'", "cannot run here"], **given, backend="cuda")
    for narrow in ("triton", "cpu"):
        doubled = given | {"student_logits": given["student_logits"].double()}
        refuse(camkd_loss, NotImplementedError, [f"'{narrow}'", "cannot run here"], **doubled, backend=narrow)
    assert re.search("float64", explain(torch.zeros(1, dtype=torch.float64)))
    refuse(explain, ValueError, ["'reference'", "'gpu'"], torch.zeros(1), backend="gpu")


@pytest.mark.parametrize(
    ("option", "error", "fragments"),
    [
        ({"temperature": -1.0}, ValueError, ["temperature", "-1.0"]),
        ({"temperature": float("nan")}, ValueError, ["temperature", "nan"]),
        ({"weighting": "best"}, ValueError, ["'confidence'", "'best'"]),
        ({"reduction": "max"}, ValueError, ["'mean'", "'max'"]),
        ({"backend": "gpu"}, ValueError, ["'auto'", "'gpu'"]),
        ({"ignore_index": 1.5}, TypeError, ["ignore_index", "float"]),
    ],
)
def test_module_refuses_at_construction(option, error, fragments):
    refuse(CAMKDLoss, error, fragments, **option)


@pytest.mark.parametrize(
    ("changes", "error", "fragments"),
    [
        ({"logits": []}, ValueError, ["1 to 16", "got 0"]),
        ({"logits": teachers((4, 10), (4, 11))}, ValueError, ["logits[1]", "11", "10"]),
        ({"logits": [torch.ones(4, 10, dtype=torch.int64)]}, TypeError, ["floating", "int64"]),
        ({"target": torch.tensor([1, 2])}, ValueError, ["(2,)", "(4,)"]),
        ({"target": torch.tensor([1, 2, 3, 10])}, ValueError, ["label 10", "10 classes"]),
        ({"target": torch.tensor([1.0, 2, 3, 4])}, TypeError, ["int64", "float32"]),
        ({"ignore_index": "x"}, TypeError, ["ignore_index", "str"]),
        ({"logits": [torch.ones(4, 0)]}, ValueError, ["C >= 1", "(4, 0)"]),
        ({"logits": [torch.tensor(1.0)], "target": torch.tensor(0)}, ValueError, ["C >= 1", "()"]),
        ({"backend": "gpu"}, ValueError, ["'reference'", "'gpu'"]),
    ],
)
def test_confidence_weights(changes, error, fragments, backend):
    given = {"logits": teachers((4, 10), (4, 10)), "target": torch.tensor([1, 2, 3, 4]), "backend": backend} | changes
    refuse(confidence_weights, error, fragments, **given)


FEATURES = [(4, 6, 3, 3), (4, 8, 2, 2)]


@pytest.mark.parametrize(
    ("changes", "error", "fragments"),
    [
        ({"student_features": teachers(FEATURES[0])}, ValueError, ["1", "2"]),
        ({"teacher_features": teachers(*FEATURES[::-1])}, ValueError, ["(4, 6, 3, 3)", "(4, 8, 2, 2)"]),
        ({"teacher_features": teachers(FEATURES[0], (5, 8, 2, 2))}, ValueError, ["(4, 8, 2, 2)", "(5, 8, 2, 2)"]),
        ({"teacher_features": [torch.randn(s, requires_grad=True) for s in FEATURES]}, ValueError, ["[0]", "grad"]),
        ({"student_features": [x.long() for x in teachers(*FEATURES)]}, TypeError, ["floating", "int64"]),
        ({"weights": torch.ones(4, 2)}, ValueError, ["(4, 2)", "(2, 4)"]),
        ({"weights": torch.ones(2, 4, dtype=torch.int64)}, TypeError, ["weights", "int64"]),
        ({"reduction": "max"}, ValueError, ["'mean'", "'max'"]),
        ({"backend": "gpu"}, ValueError, ["'reference'", "'gpu'"]),
        ({"student_features": [], "teacher_features": []}, ValueError, ["1 to 16", "got 0"]),
    ],
)
def test_weighted_feature_loss(changes, error, fragments, backend):
    given = {
        "student_features": teachers(*FEATURES),
        "teacher_features": teachers(*FEATURES),
        "weights": torch.ones(2, 4),
        "backend": backend,
    }
    refuse(weighted_feature_loss, error, fragments, **(given | changes))


@pytest.mark.parametrize(
    ("changes", "error", "fragments"),
    [
        ({"student_features": [1.0, 2.0]}, TypeError, ["student_features[0]", "float"]),
        ({"teacher_features": teachers(*FEATURES[::-1])}, ValueError, ["(4, 6, 3, 3)", "(4, 8, 2, 2)"]),
        ({"teacher_features": [torch.randn(s, requires_grad=True) for s in FEATURES]}, ValueError, ["[0]", "grad"]),
        ({"logits": None}, ValueError, ["logits is None", "2 tensors"]),
        ({"logits": teachers((4, 10))}, ValueError, ["logits holds 1", "student_features holds 2"]),
        ({"logits": teachers((4, 10), (4, 11))}, ValueError, ["logits[1]", "11", "10"]),
        ({"target": torch.tensor([1, 2])}, ValueError, ["(2,)", "(4,)"]),
        ({"target": torch.tensor([1, 2, 3, 10])}, ValueError, ["label 10", "10 classes"]),
        ({"target": torch.tensor([1.0, 2, 3, 4])}, TypeError, ["int64", "float32"]),
        ({"weighting": "entropy"}, ValueError, ["'uniform'", "'entropy'"]),
        ({"weighting": torch.ones(3)}, ValueError, ["(3,)", "(2,) or (2, 4)"]),
        ({"weighting": torch.ones(2, dtype=torch.int64)}, TypeError, ["weighting", "int64"]),
        ({"beta": float("nan")}, ValueError, ["beta", "nan"]),
        ({"loss_scale": torch.ones(2)}, ValueError, ["loss_scale", "(2,)"]),
        ({"num_items": 0}, ValueError, ["num_items", "0"]),
        ({"num_items": torch.tensor(-1.0)}, ValueError, ["num_items", "-1.0"]),
        ({"num_items": 3, "reduction": "sum"}, ValueError, ["num_items", "'sum'"]),
        ({"reduction": "max"}, ValueError, ["'mean'", "'max'"]),
        ({"ignore_index": 1.5}, TypeError, ["ignore_index", "float"]),
        ({"backend": "gpu"}, ValueError, ["'reference'", "'gpu'"]),
    ],
)
def test_feature_loss_and_grad(changes, error, fragments, backend):
    given = {
        "student_features": teachers(*FEATURES),
        "teacher_features": teachers(*FEATURES),
        "logits": teachers((4, 10), (4, 10)),
        "target": torch.tensor([1, 2, 3, 4]),
        "backend": backend,
    }
    refuse(camkd_feature_loss_and_grad, error, fragments, **(given | changes))


def test_feature_module():
    refuse(CAMKDFeatureLoss, ValueError, ["1 to 16", "got 0"], 4, [])
    module = CAMKDFeatureLoss(4, [6, 8])
    target, feature = torch.tensor([0, 1, 2, 3]), torch.randn(4, 4, 3, 3)
    heads = [torch.nn.Flatten(), torch.nn.Flatten()]
    refuse(module, ValueError, ["teacher_features", "1", "2"], feature, teachers(FEATURES[0]), heads, target)
    refuse(module, ValueError, ["teacher_heads", "1", "2"], feature, teachers(*FEATURES), heads[:1], target)
