"""Keywords at other values than their defaults, at every entry point, eager and compiled."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from camkd_fast import CAMKDFeatureLoss, CAMKDLoss, camkd_loss, camkd_loss_and_grad, confidence_weights
from tests.support.cases import Case, make_case
from tests.support.evaluate import fields, run, run_value_and_grad
from tests.support.tolerance import assert_accurate, assert_near, assert_result
from tests.support.truth import naive, truth


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


# 7 is a class, 255 the mark of segmentation data, -1 that of object detection. No label is -100.
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [7, 255, -1])
def test_ignore_index(ignore_index: int, reduction: str, backend: str) -> None:
    case = make_case(40, 10, ignore_index=ignore_index, ignored=0.3, reduction=reduction)
    grad_output = torch.ones(40) if reduction == "none" else None
    R, N = truth(case, grad_output), naive(case, grad_output)
    for result in (run(case, backend, grad_output), run_value_and_grad(case, backend)):
        assert_result(result, case, R, N)
        assert (result.grad[case.target == ignore_index] == 0).all()


@pytest.mark.parametrize("ignore_index", [7, 255, -1])
def test_the_default_mark_is_no_label_under_another_one(ignore_index: int, backend: str) -> None:
    case = make_case(8, 10, ignore_index=ignore_index)
    target = case.target.clone()
    target[3] = -100
    with pytest.raises(ValueError, match="label -100, but there are 10 classes"):
        run(case.with_(target=target), backend)


@pytest.mark.parametrize("ignore_index", [True, False, 1.0, None, torch.tensor(1)], ids=str)
def test_an_ignore_index_is_an_int(ignore_index: Any, backend: str) -> None:
    case = make_case(8, 10)
    arguments = case.student, case.teachers, case.target
    for call in (
        lambda: camkd_loss(*arguments, ignore_index=ignore_index, backend=backend),
        lambda: camkd_loss_and_grad(*arguments, ignore_index=ignore_index, backend=backend),
        lambda: CAMKDLoss(ignore_index=ignore_index, backend=backend),
        lambda: confidence_weights(case.teachers, case.target, ignore_index, backend=backend),
    ):
        with pytest.raises(TypeError, match="ignore_index must be an int, got "):
            call()


# --- the module ------------------------------------------------------------------------------------------------------

KEYWORDS: dict[str, Any] = {
    "temperature": 2.5,
    "hard_weight": 0.3,
    "soft_weight": 0.6,
    "weighting": "entropy",
    "reduction": "sum",
    "ignore_index": 7,
    "backend": "reference",
    "divergence": ("jsd", 0.3),
    "scale_by_t2": False,
    "z_loss_weight": 0.1,
    "student_logit_scale": 0.5,
    "student_softcap": 2.0,
    "teacher_logit_scales": (0.5, 2.0, 3.0),
    "teacher_softcaps": (None, 1.0, 2.0),
    "entropy": True,
}
CHANGE_NO_LOSS = ("backend", "entropy")


def test_every_keyword_of_the_module_is_tested() -> None:
    assert set(inspect.signature(CAMKDLoss).parameters) == set(KEYWORDS)
    assert set(KEYWORDS) < set(inspect.signature(camkd_loss).parameters)
    assert set(KEYWORDS) < set(inspect.signature(camkd_loss_and_grad).parameters)


@pytest.mark.parametrize("name", KEYWORDS)
def test_the_module_passes_every_keyword_on(name: str) -> None:
    case = make_case(40, 10)
    given = {name: KEYWORDS[name]}
    module = CAMKDLoss(**given)
    expected = camkd_loss(case.student, case.teachers, case.target, **given)
    ours = module(case.student, case.teachers, case.target)
    assert all(torch.equal(a, b) for a, b in zip(fields(ours), fields(expected), strict=True))
    assert getattr(module, name) == KEYWORDS[name] and f"{name}={KEYWORDS[name]}" in repr(module)
    if name not in CHANGE_NO_LOSS:
        default = camkd_loss(case.student, case.teachers, case.target)
        assert not torch.equal(ours.loss, default.loss)


@pytest.mark.parametrize("name", [name for name in KEYWORDS if name != "backend"])
def test_both_functions_take_every_keyword_compiled_too(name: str) -> None:
    case = make_case(40, 10)
    given = {name: KEYWORDS[name]}

    def both(student: Tensor, teachers: list[Tensor], target: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        out, grad = camkd_loss_and_grad(student, teachers, target, **given)
        return fields(camkd_loss(student, teachers, target, **given)), fields(out), grad

    arguments = case.student, list(case.teachers), case.target
    loss, other, grad = both(*arguments)
    student = case.student.detach().requires_grad_()
    camkd_loss(student, list(case.teachers), case.target, **given).loss.backward()
    assert_near(grad, student.grad)
    traced = torch.compile(both, backend="aot_eager", fullgraph=True)(*arguments)
    for a, b, c, d in zip(loss, other, *traced[:2], strict=True):
        assert_near(b, a)
        assert_near(c, a)
        assert_near(d, a)
    assert_near(traced[2], grad)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss_scale", [64.0, torch.tensor(0.25)], ids=str)
def test_a_loss_scale_multiplies_the_gradient_compiled_too(loss_scale: Any, reduction: str) -> None:
    case = make_case(40, 10, ignored=0.3, reduction=reduction)

    def scaled(student: Tensor, teachers: list[Tensor], target: Tensor, scale: Any) -> Tensor:
        num_items = 12.5 if reduction == "mean" else None
        return camkd_loss_and_grad(
            student, teachers, target, loss_scale=scale, num_items=num_items, reduction=reduction
        )[1]

    arguments = case.student, list(case.teachers), case.target
    expected = float(loss_scale) * scaled(*arguments, 1.0)
    assert_near(scaled(*arguments, loss_scale), expected)
    assert_near(torch.compile(scaled, backend="aot_eager", fullgraph=True)(*arguments, loss_scale), expected)


@pytest.mark.parametrize(
    ("layout", "compiled"), [("every other", False), ("expanded", False), ("a column", False), ("every other", True)]
)
def test_labels_of_any_strides(layout: str, compiled: bool) -> None:
    """Vectors of labels too: what a view leaves out must not be read."""
    case = make_case(12, 10)
    labels = {
        "every other": torch.stack([case.target, case.target.flip(0)], 1).flatten()[::2],
        "expanded": case.target[:1].expand(12),
        "a column": torch.stack([case.target, case.target.flip(0)], 1)[:, 0],
    }[layout]

    def all_of_it(student: Tensor, teachers: list[Tensor], target: Tensor) -> list[Tensor]:
        loss = camkd_loss(student, teachers, target, reduction="none").loss
        _, grad = camkd_loss_and_grad(student, teachers, target)
        return [loss, grad, *confidence_weights(teachers, target)]

    expected = all_of_it(case.student, list(case.teachers), labels.clone())
    call = torch.compile(all_of_it, backend="aot_eager", fullgraph=True) if compiled else all_of_it
    for ours, theirs in zip(call(case.student, list(case.teachers), labels), expected, strict=True):
        assert_near(ours, theirs)


# --- the feature loss ------------------------------------------------------------------------------------------------


def gradients(function: Callable[[list[Tensor], Tensor], Tensor], logits: list[Tensor], target: Tensor) -> list[Tensor]:
    leaves = [z.detach().clone().requires_grad_() for z in logits]
    function(leaves, target).backward()
    return [z.grad for z in leaves]


@pytest.mark.parametrize(("ignore_index", "compiled"), [(7, False), (255, False), (-1, False), (255, True)])
def test_confidence_weights_ignore_what_they_are_asked_to(ignore_index: int, compiled: bool, backend: str) -> None:
    case = make_case(40, 10, ignored=0.3, ignore_index=ignore_index, padded=False)
    default = case.target.where(case.target != ignore_index, -100)
    cotangents = torch.randn(2, 3, 40)

    def function(ignore_index: int) -> Callable[[list[Tensor], Tensor], Tensor]:
        def total(logits: list[Tensor], target: Tensor) -> Tensor:
            weights, ce = confidence_weights(logits, target, ignore_index, backend=backend)
            return (weights * cotangents[0]).sum() + (ce * cotangents[1]).sum()

        return torch.compile(total, backend="aot_eager", fullgraph=True) if compiled else total

    ours = gradients(function(ignore_index), list(case.teachers), case.target)
    expected = gradients(function(-100), list(case.teachers), default)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    ignored = case.target == ignore_index
    assert ignored.any() and all((z[ignored] == 0).all() and z[~ignored].any() for z in ours)
    weights, ce = confidence_weights(case.teachers, case.target, ignore_index, backend=backend)
    assert (weights[:, ignored] == 0).all() and (ce[:, ignored] == 0).all() and (weights[:, ~ignored] > 0).all()


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("ignore_index", [7, 255, -1])
def test_the_feature_module_ignores_what_it_is_asked_to(ignore_index: int, detach: bool, backend: str) -> None:
    torch.manual_seed(0)
    module = CAMKDFeatureLoss(4, [6, 5], detach, ignore_index, backend=backend)
    student = torch.randn(8, 4, 4, 4)
    teachers = [torch.rand(8, 6, 3, 6), torch.rand(8, 5, 6, 3)]  # one side smaller and one larger than the student's
    heads = [torch.nn.Linear(6, 10).requires_grad_(False), torch.nn.Linear(5, 10).requires_grad_(False)]
    pooled = [lambda f, head=head: head(f.mean((2, 3))) for head in heads]
    target = torch.tensor([0, 1, ignore_index, 3, ignore_index, 5, 6, 8])
    results = []
    for index, labels in ((ignore_index, target), (-100, target.where(target != ignore_index, -100))):
        module.ignore_index = index
        leaf = student.clone().requires_grad_()
        out = module(leaf, teachers, pooled, labels)
        out.loss.backward()
        results.append([*out, leaf.grad])
    assert CAMKDFeatureLoss(4, [6], ignore_index=ignore_index).ignore_index == ignore_index
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert (results[0][1][:, [2, 4]] == 0).all() and (results[0][1][:, [0, 1, 3]] > 0).all()


# --- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_single_teacher_of_float64(dtype: torch.dtype) -> None:
    """The compiled kernels have no float64: the reference computes all of it, and whichever teacher it is."""
    for teachers in ((torch.float64, torch.float32, torch.float32), (torch.float32, torch.float32, torch.float64)):
        case = make_case(12, 20, 3, dtype, teacher_dtypes=teachers)
        R, N = truth(case), naive(case)
        for result in (run(case, "auto"), run_value_and_grad(case, "auto")):
            assert_result(result, case, R, N)
        with pytest.raises(NotImplementedError, match="got float64"):
            run(case, "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_no_result(dtype: torch.dtype, backend: str) -> None:
    case = make_case(12, 20, 3, ignore_index=7, weighting=torch.rand(3))
    features = [torch.rand(12, 4, 3, 3), torch.rand(12, 6, 2, 2)]
    module = CAMKDFeatureLoss(4, [6, 5], ignore_index=7, backend=backend).eval()
    maps, heads = [torch.rand(12, 6, 3, 3), torch.rand(12, 5, 2, 2)], [lambda f: f.mean((2, 3))[:, :5]] * 2
    regressed = module.regress(features[0], maps)

    def all_of_it() -> list[Tensor]:
        result, other = run(case, backend), run_value_and_grad(case, backend)
        weights, ce = confidence_weights(case.teachers, case.target, 7, backend=backend)
        ours = [head(r) for head, r in zip(heads, regressed, strict=True)]
        return [*result, *other[:-1], weights, ce, *confidence_weights(ours, case.target % 5, 3, backend=backend)]

    expected = all_of_it()
    with torch.autocast("cpu", dtype=dtype):
        for ours, plain in zip(all_of_it(), expected, strict=True):
            assert torch.equal(ours, plain) and ours.dtype == plain.dtype


@pytest.mark.parametrize("num_items", [5, 12.5, torch.tensor(9), torch.tensor([0.5])], ids=str)
@pytest.mark.parametrize("ignore_index", [7, 255])
def test_num_items_with_another_ignore_index(num_items: Any, ignore_index: int, backend: str) -> None:
    case = make_case(40, 10, ignore_index=ignore_index, ignored=0.3, num_items=num_items, temperature=2.5)
    R, N = truth(case), naive(case)
    for result in (run(case, backend), run_value_and_grad(case, backend)):
        assert_accurate(result.grad, R.grad, N.grad)
        assert_near(result.loss, R.loss.float(), rtol=1e-5)


def test_a_case_without_options_has_the_defaults() -> None:
    defaults = {name: p.default for name, p in inspect.signature(camkd_loss).parameters.items()}
    for name, value in Case(torch.zeros(1, 2), (), torch.zeros(1)).options().items():
        assert defaults[name] == value, name
