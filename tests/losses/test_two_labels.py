"""Rows of two labels, as Mixup and CutMix make them: the formulas, and the conventions at the edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd import gradcheck

from camkd_fast import (
    CAMKDFeatureLoss,
    CAMKDLoss,
    camkd_feature_loss_and_grad,
    camkd_loss,
    camkd_loss_and_grad,
    confidence_weights,
)
from tests.support.cases import Case, make_case
from tests.support.evaluate import Result, fields, run, run_value_and_grad
from tests.support.tolerance import assert_near, assert_result
from tests.support.truth import naive, truth

INF = float("inf")


def assert_rule(case: Case, backend: str, grad_output: torch.Tensor | None = None) -> None:
    R, N = truth(case, grad_output), naive(case, grad_output)
    assert_result(run(case, backend, grad_output), case, R, N, "loss")
    if grad_output is None:
        assert_result(run_value_and_grad(case, backend), case, R, N, "value and gradient")


def assert_same_bits(ours: Result, expected: Result) -> None:
    for a, b in zip(ours, expected, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


@pytest.mark.parametrize("weighting", ["confidence", "entropy", "uniform", "per row"])
@pytest.mark.parametrize("peaked", [False, True])
@pytest.mark.parametrize(("N", "C", "K"), [(37, 10, 3), (64, 100, 1), (9, 1000, 2), (2, 5000, 5), (3, 33, 16)])
def test_the_formulas(N: int, C: int, K: int, peaked: bool, weighting: str, backend: str) -> None:
    given = torch.rand(K, N) if weighting == "per row" else weighting
    assert_rule(make_case(N, C, K, peaked=peaked, ignored=0.2, weighting=given, two_labels=True), backend)


OPTIONS = [{"reduction": "sum"}, {"temperature": 3.0}, {"num_items": 7}, {"hard_weight": -0.5}]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_formulas_of_other_options(options: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    assert_rule(make_case(37, 100, 3, dtype, ignored=0.2, two_labels=True, **options), backend)


def test_a_loss_for_each_token(backend: str) -> None:
    case = make_case(24, 65, lead=(4, 6), ignored=0.2, reduction="none", two_labels=True)
    assert_rule(case, backend, torch.randn(4, 6))


@pytest.mark.parametrize("offset", [1e3, -1e4])
def test_a_common_offset_of_a_row_costs_no_accuracy(offset: float, backend: str) -> None:
    case = make_case(24, 65, two_labels=True)
    # Rounded once, so that all that follows is exact.
    assert_rule(case.with_(student=case.student + offset, teachers=tuple(z + offset for z in case.teachers)), backend)


def test_the_cross_entropies_are_mixed(backend: str) -> None:
    case = make_case(37, 20, two_labels=True, reduction="none")
    of_one = [case.with_(target=y, second_target=None, mix=None) for y in labels(case)]
    first, second, ours = (run(c, backend, torch.ones(37)) for c in (*of_one, case))
    for name in ("hard", "teacher_ce"):
        mixed = case.mix * getattr(first, name) + (1 - case.mix) * getattr(second, name)
        assert_near(getattr(ours, name), mixed)
    assert_near(ours.divergence, first.divergence)


def labels(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    assert case.second_target is not None
    return case.target, case.second_target


@pytest.mark.parametrize("C", [10, 5000])
def test_a_row_of_one_label_has_the_same_bits(C: int, backend: str) -> None:
    """By a share of 0 or 1 or by equal labels."""
    case = make_case(12, C, ignored=0.2)
    label, other = case.target, torch.randint(C, (12,))
    for target, second_target, mix in (
        (label, other, torch.ones(12)),
        (other.where(label >= 0, label), label, torch.zeros(12)),
        (label, label, torch.rand(12)),
    ):
        mixed = case.with_(target=target, second_target=second_target, mix=mix)
        assert_same_bits(run(mixed, backend), run(case, backend))
        assert_same_bits(run_value_and_grad(mixed, backend), run_value_and_grad(case, backend))


@pytest.mark.parametrize("C", [10, 5000])
@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("value", [-INF, torch.finfo(torch.float32).min])
def test_logits_at_a_label_without_a_share_do_not_count(C: int, share: float, value: float, backend: str) -> None:
    case = make_case(12, C)
    used, unused = case.target, (case.target + 1) % C
    tensors = [z.scatter(1, unused.unsqueeze(1), value) for z in (case.student, *case.teachers)]
    case = case.with_(student=tensors[0], teachers=tuple(tensors[1:]))
    first, second = (used, unused) if share else (unused, used)
    mixed = case.with_(target=first, second_target=second, mix=torch.full((12,), share))
    assert_same_bits(run(mixed, backend), run(case, backend))
    assert all(x.isfinite().all() for x in run(mixed, backend)[:-1])


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("share", [1e-3, 0.5])
def test_a_masked_label_with_a_share_is_infinite(share: float, which: int, backend: str) -> None:
    """As a masked label is: `which` of the two is."""
    case = make_case(9, 33, reduction="none")
    case = case.with_(second_target=(case.target + 1) % 33, mix=torch.full((9,), share))
    column = int(labels(case)[which][2])
    student, *teachers = (z.clone() for z in (case.student, *case.teachers))
    for z in (student, teachers[0]):
        z[2, column] = -INF
    result, clean = (
        run(c, backend, torch.ones(9)) for c in (case.with_(student=student, teachers=tuple(teachers)), case)
    )
    assert result.hard[2] == INF and result.loss[2] == INF and result.teacher_ce[0, 2] == INF
    assert_near(result.weights[:, 2], torch.tensor([0.0, 0.5, 0.5]))
    assert result.grad.isfinite().all()
    others = torch.arange(9) != 2
    assert torch.equal(result.loss[others], clean.loss[others]) and torch.equal(result.grad[others], clean.grad[others])


def test_the_second_labels_of_ignored_rows_are_not_read(backend: str) -> None:
    case = make_case(12, 20, ignored=0.5, reduction="none", two_labels=True)
    ignored = case.target == case.ignore_index
    assert ignored.any() and case.mix[ignored].isnan().all() and (case.second_target[ignored] == -7).all()
    result = run(case, backend, torch.ones(12))
    assert not result.grad[ignored].any() and not any(x[..., ignored].any() for x in result[:6])
    assert all(x.isfinite().all() for x in result[:7])


@pytest.mark.parametrize("backend", ["reference"])
def test_gradcheck(backend: str) -> None:
    case = make_case(5, 6, 2, torch.float64, ignored=0.2, padded=False, two_labels=True)
    second = {"second_target": case.second_target, "mix": case.mix.double(), "backend": backend}
    student = case.student.requires_grad_()
    assert gradcheck(lambda s: camkd_loss(s, case.teachers, case.target, **second).loss, student)
    logits = tuple(z.detach().requires_grad_() for z in case.teachers)
    assert gradcheck(lambda *z: confidence_weights(z, case.target, **second), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("K", "C"), [(1, 10), (3, 100), (4, 5000)])
def test_confidence_weights(K: int, C: int, dtype: torch.dtype, backend: str) -> None:
    """Values and gradients against float64."""
    case = make_case(11, C, K, dtype, ignored=0.2, two_labels=True)
    cotangents = torch.randn(2, K, 11)
    results = []
    for name, wide in ((backend, torch.Tensor.float), ("reference", torch.Tensor.double)):
        logits = [z.detach().clone() if name == backend else wide(z) for z in case.teachers]
        logits = [z.requires_grad_() for z in logits]
        second = {"second_target": case.second_target, "mix": wide(case.mix)}
        found = confidence_weights(logits, case.target, backend=name, **second)
        torch.autograd.backward(found, [wide(x) for x in cotangents])
        results.append([x.detach() for x in found] + [z.grad for z in logits])
    for ours, true in zip(*results, strict=True):
        assert_near(ours, true, rtol=8e-3 if ours.dtype == torch.bfloat16 else 2e-6)
    assert_near(results[0][1], truth(case).teacher_ce.float())


def test_the_gradient_of_one_cross_entropy(backend: str) -> None:
    """softmax - mix onehot(target) - (1 - mix) onehot(second_target)."""
    case = make_case(8, 9, 1, padded=False, two_labels=True)
    logits = case.teachers[0].requires_grad_()
    second = {"second_target": case.second_target, "mix": case.mix}
    confidence_weights([logits], case.target, backend=backend, **second)[1].sum().backward()
    onehots = [torch.nn.functional.one_hot(y, 9) for y in labels(case)]
    mix = case.mix.unsqueeze(1)
    expected = logits.detach().double().softmax(1) - mix.double() * onehots[0] - (1 - mix.double()) * onehots[1]
    assert_near(logits.grad, expected)


@pytest.mark.parametrize("lead", [(12,), (3, 4)], ids=str)
def test_second_labels_of_any_layout_and_dtype(lead: tuple[int, ...], backend: str) -> None:
    case = make_case(12, 20, lead=lead, two_labels=True)
    expected = run(case, backend)
    scattered = torch.stack([case.second_target] * 2, -1)[..., 0], torch.stack([case.mix] * 2, -1)[..., 0]
    assert_same_bits(run(case.with_(second_target=scattered[0], mix=scattered[1]), backend), expected)
    half = case.with_(mix=case.mix.half().float())
    for dtype in (torch.float16, torch.float64):
        assert_same_bits(run(half.with_(mix=half.mix.to(dtype)), backend), run(half, backend))
    same = case.with_(mix=torch.tensor(0.25).expand(lead), second_target=torch.tensor(3).expand(lead))
    written_out = same.with_(mix=same.mix.clone(), second_target=same.second_target.clone())
    assert_same_bits(run(same, backend), run(written_out, backend))


def test_the_module_takes_them_in_the_call(backend: str) -> None:
    case = make_case(12, 20, two_labels=True)
    criterion = CAMKDLoss(backend=backend)
    second = {"second_target": case.second_target, "mix": case.mix}
    out = criterion(case.student, case.teachers, case.target, **second)
    for ours, expected in zip(fields(out), run(case, backend)[:6], strict=True):
        assert torch.equal(ours, expected)
    # Constants, which autograd may save.
    with torch.inference_mode():
        made = {name: value.clone() for name, value in second.items()}
    student = case.student.detach().requires_grad_()
    criterion(student, case.teachers, case.target, **made).loss.backward()
    assert torch.equal(student.grad, run(case, backend).grad)
    logits = [z.detach().requires_grad_() for z in case.teachers]
    confidence_weights(logits, case.target, backend=backend, **made)[1].sum().backward()
    assert all(z.grad.isfinite().all() for z in logits)


@pytest.mark.parametrize("detach_weights", [False, True])
def test_the_feature_loss(detach_weights: bool, backend: str) -> None:
    """Weights by confidence_weights of the heads' logits, whichever way the loss is computed."""
    module = CAMKDFeatureLoss(4, [6, 5], detach_weights=detach_weights, backend=backend).eval()
    maps, heads = [torch.rand(9, 6, 3, 3), torch.rand(9, 5, 2, 2)], [lambda f: f.mean((2, 3))[:, :5]] * 2
    student, case = torch.rand(9, 4, 3, 3), make_case(9, 5, 1, ignored=0.2, two_labels=True)
    second = {"second_target": case.second_target, "mix": case.mix}
    out = module(student, maps, heads, case.target, **second)
    regressed = [r.detach() for r in module.regress(student, maps)]
    logits = [head(r) for head, r in zip(heads, regressed, strict=True)]
    weights, ce = confidence_weights(logits, case.target, backend="reference", **second)
    assert_near(out.weights.detach(), weights)
    assert_near(out.teacher_ce.detach(), ce)
    errors = torch.stack([(r - f).square().flatten(1).mean(1) for r, f in zip(regressed, maps, strict=True)])
    assert_near(out.loss.detach(), (weights * errors).sum() / (case.target >= 0).sum())
    finished, _, grads = module.loss_and_grad(student, maps, heads, case.target, **second)
    assert_near(finished.loss, out.loss.detach())
    again, others = camkd_feature_loss_and_grad(regressed, maps, logits, case.target, backend=backend, **second)
    assert_near(again.weights, weights)
    for a, b in zip(grads, others, strict=True):
        assert_near(a, b)
    one, _ = camkd_feature_loss_and_grad(regressed, maps, logits, case.target, backend=backend)
    assert not torch.equal(one.weights, again.weights)


def test_labels_are_checked_in_every_function(backend: str) -> None:
    logits, maps = torch.randn(3, 4, 5), torch.randn(2, 4, 5)
    wrong = {"second_target": torch.tensor([0, 5, 1, 1]), "mix": torch.rand(4), "backend": backend}
    target = torch.arange(4)
    for call in (
        lambda: camkd_loss_and_grad(logits[0], list(logits[1:]), target, **wrong),
        lambda: confidence_weights(list(logits), target, **wrong),
        lambda: camkd_feature_loss_and_grad(list(maps), list(maps), list(logits[:2]), target, **wrong),
    ):
        with pytest.raises(ValueError, match="label 5 where target holds 1, but there are 5 classes"):
            call()
