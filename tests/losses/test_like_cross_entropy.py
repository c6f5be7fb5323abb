"""What people do with nn.CrossEntropyLoss, its arguments and its results, they can do here."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from camkd_fast import (
    CAMKDFeatureLoss,
    CAMKDLoss,
    camkd_loss,
    camkd_loss_and_grad,
    confidence_weights,
    weighted_feature_loss,
)
from tests.support.tolerance import assert_near

N, C = 6, 10
PARTS = ("loss", "hard", "soft", "weights", "teacher_ce", "divergence")


@pytest.fixture
def x():
    return torch.randn(N, C, requires_grad=True), [torch.randn(N, C), torch.randn(N, C)], torch.randint(C, (N,))


# --- results may be changed in place ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"weighting": torch.tensor([0.3, 0.6])}, {"ignore_index": 3}])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_loss_may_be_changed_in_place(x, reduction, options, backend):
    student, teachers, target = x
    factor = torch.linspace(-1, 2, N) if reduction == "none" else torch.tensor(3.0)

    def loss():
        return camkd_loss(student, teachers, target, reduction=reduction, backend=backend, **options).loss

    (expected,) = torch.autograd.grad((loss() * factor + 1).sum(), student)
    for change in (lambda z: z.mul_(factor).add_(1), lambda z: z.__imul__(factor).__iadd__(1)):
        changed = loss()
        change(changed)
        assert_near(torch.autograd.grad(changed.sum(), student)[0], expected)
    changed = loss()
    if reduction == "none":
        changed[1] = 0
        changed[2:].zero_()
        (gradient,) = torch.autograd.grad(changed.sum(), student)
        assert gradient[0].abs().sum() > 0 and gradient[1:].abs().sum() == 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("part", PARTS[1:])
def test_other_results_may_be_changed_in_place(x, reduction, part, backend):
    student, teachers, target = x
    weighting = torch.tensor([0.3, 0.6], requires_grad=True)
    out = camkd_loss(student, teachers, target, weighting=weighting, reduction=reduction, backend=backend)
    before = {name: getattr(out, name).clone() for name in PARTS}
    expected = torch.autograd.grad(out.loss.sum(), (student, weighting), retain_graph=True)
    getattr(out, part).mul_(0)
    for name in PARTS:
        assert torch.equal(getattr(out, name), before[name])
    for found, right in zip(torch.autograd.grad(out.loss.sum(), (student, weighting)), expected, strict=True):
        assert torch.equal(found, right)


def test_weights_and_feature_losses_may_be_changed_in_place(backend):
    logits, target = torch.randn(N, C, requires_grad=True), torch.randint(C, (N,))
    mask = torch.linspace(-1, 1, N)

    def both():
        return confidence_weights([logits, torch.ones(N, C)], target, backend=backend)

    weights, ce = both()
    (expected,) = torch.autograd.grad((weights * mask + ce * mask).sum(), logits)
    weights, ce = both()
    weights *= mask
    ce *= mask
    assert_near(torch.autograd.grad((weights + ce).sum(), logits)[0], expected)
    student, teacher = torch.randn(N, 7, requires_grad=True), torch.randn(N, 7)
    for reduction in ("none", "sum", "mean"):
        loss = weighted_feature_loss([student], [teacher], torch.ones(1, N), reduction, backend)
        factor = mask if reduction == "none" else torch.tensor(2.0)
        (expected,) = torch.autograd.grad((loss * factor).sum(), student, retain_graph=True)
        loss = weighted_feature_loss([student], [teacher], torch.ones(1, N), reduction, backend)
        loss *= factor
        assert_near(torch.autograd.grad(loss.sum(), student)[0], expected)


# --- inference mode ---------------------------------------------------------------------------------------------------


def inference(tensor):
    with torch.inference_mode():
        return tensor.detach().clone()


@pytest.mark.parametrize("which", ["teachers", "target", "weighting", "num_items", "all"])
def test_logit_loss_with_tensors_of_inference_mode(x, which, backend):
    student, teachers, target = x
    weighting, items = torch.tensor([0.3, 0.6]), torch.tensor(4)
    call = {"teachers": teachers, "target": target, "weighting": weighting, "num_items": items}

    def gradient(teachers, target, weighting, num_items):
        loss = camkd_loss(student, teachers, target, weighting=weighting, num_items=num_items, backend=backend).loss
        return torch.autograd.grad(loss, student)[0]

    expected = gradient(**call)
    names = list(call) if which == "all" else [which]
    given = {name: [inference(t) for t in teachers] if name == "teachers" else inference(call[name]) for name in names}
    assert torch.equal(gradient(**call | given), expected)
    with torch.inference_mode():
        assert_near(camkd_loss_and_grad(student, **_renamed(call | given), backend=backend)[1], expected)


def _renamed(call):
    return {("teacher_logits" if name == "teachers" else name): value for name, value in call.items()}


def test_weights_and_features_with_tensors_of_inference_mode(backend):
    logits, other, target = torch.randn(N, C, requires_grad=True), torch.randn(N, C), torch.randint(C, (N,))

    def by_logits(other, target):
        return torch.autograd.grad(confidence_weights([logits, other], target, backend=backend)[0][0].sum(), logits)[0]

    assert torch.equal(by_logits(inference(other), inference(target)), by_logits(other, target))
    student, teacher, weights = torch.randn(N, 4, 3, 3, requires_grad=True), torch.randn(N, 4, 3, 3), torch.rand(1, N)

    def by_feature(teacher, weights):
        return torch.autograd.grad(weighted_feature_loss([student], [teacher], weights, backend=backend), student)[0]

    expected = by_feature(teacher, weights)
    assert torch.equal(by_feature(inference(teacher), weights), expected)
    assert torch.equal(by_feature(inference(teacher), inference(weights)), expected)
    channels_last = inference(teacher).contiguous(memory_format=torch.channels_last)
    assert_near(by_feature(channels_last, weights), expected)


def test_a_feature_module_with_tensors_of_inference_mode():
    module, head = CAMKDFeatureLoss(3, [4], detach_weights=False), nn.Sequential(nn.Flatten(), nn.Linear(16, C))
    head.requires_grad_(False)
    student, teacher, target = torch.randn(N, 3, 2, 2), torch.randn(N, 4, 2, 2), torch.randint(C, (N,))
    gradients = []
    for f, y, items in ((teacher, target, torch.tensor(4)), map(inference, (teacher, target, torch.tensor(4)))):
        module.zero_grad()
        module(student, [f], [head], y, num_items=items).loss.backward()
        gradients.append([p.grad.clone() for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# --- a weighting tensor is a buffer -----------------------------------------------------------------------------------


def test_a_weighting_tensor_moves_and_is_saved():
    weights = torch.tensor([0.2, 0.8])
    module = CAMKDLoss(weighting=weights)
    assert list(module.state_dict()) == ["weighting"] and not list(module.parameters())
    assert CAMKDLoss(weighting=weights).to("meta").weighting.device.type == "meta"
    assert CAMKDLoss(weighting=weights).double().weighting.dtype == torch.float64
    other = CAMKDLoss(weighting=torch.zeros(2))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.weighting, weights)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), _saved(module)):
        assert torch.equal(twin.weighting, weights) and "weighting" in twin.state_dict()
        assert twin.formula.weighting is twin.weighting


def _saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_weighting_parameter_stays_one_and_names_stay_names(x):
    student, teachers, target = x
    module = CAMKDLoss(weighting=nn.Parameter(torch.tensor([0.2, 0.8])))
    assert [name for name, _ in module.named_parameters()] == ["weighting"]
    module(student, teachers, target).loss.backward()
    assert module.weighting.grad is not None
    assert not CAMKDLoss(weighting="entropy").state_dict()
    # Any of the three may replace any other.
    values = ["uniform", torch.tensor([0.5, 0.5]), nn.Parameter(torch.tensor([0.5, 0.5])), "uniform"]
    expected = camkd_loss(student, teachers, target, weighting="uniform").loss
    for value in values + values[::-1]:
        module.weighting = value
        assert module.weighting is value
        assert_near(module(student, teachers, target).loss, expected)
        assert len(list(module.parameters())) == isinstance(value, nn.Parameter)
        assert len(list(module.buffers())) == (isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter))


# --- numbers ----------------------------------------------------------------------------------------------------------

NUMBERS = [np.float32, np.float64, np.float16, np.int64, np.uint8]


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_scalars_of_numpy_are_numbers(x, kind, reduction, backend):
    student, teachers, target = x
    items = {"num_items": 5} if reduction == "mean" else {}
    numbers = {"temperature": 2, "hard_weight": 1, "soft_weight": 3, **items}
    of_numpy = {name: kind(value) for name, value in numbers.items()}
    options = {"reduction": reduction, "backend": backend}
    expected = camkd_loss(student, teachers, target, ignore_index=3, **numbers, **options)
    found = camkd_loss(student, teachers, target, ignore_index=np.int64(3), **of_numpy, **options)
    assert torch.equal(found.loss, expected.loss)
    found, grad = camkd_loss_and_grad(student, teachers, target, loss_scale=kind(4), **of_numpy, **options)
    assert_near(grad, camkd_loss_and_grad(student, teachers, target, loss_scale=4, **numbers, **options)[1])
    module = CAMKDLoss(kind(2), kind(1), kind(3), ignore_index=np.int32(3), reduction=reduction, backend=backend)
    found = module(student, teachers, target, num_items=of_numpy.get("num_items"))
    assert torch.equal(found.loss, expected.loss)
    weights = confidence_weights(teachers, target, ignore_index=np.int16(3), backend=backend)[0]
    assert torch.equal(weights, confidence_weights(teachers, target, ignore_index=3, backend=backend)[0])


@pytest.mark.parametrize(
    "value", [np.float32("nan"), np.float64(0), np.int64(-1), np.array([2.0]), np.datetime64(1, "s")]
)
def test_bad_numbers_of_numpy_are_refused(x, value):
    with pytest.raises((TypeError, ValueError), match="temperature must be"):
        camkd_loss(*x, temperature=value)


# --- a divisor of 0 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"weighting": "entropy"}, {"weighting": torch.tensor([0.3, 0.6])}])
def test_no_items_and_no_rows_give_exactly_zero(x, options, dtype, backend):
    student, teachers, _ = x
    target, items = torch.full((N,), -100), torch.tensor(0, dtype=dtype)
    for logits in (student, student.detach().half().requires_grad_()):
        out = camkd_loss(logits, teachers, target, num_items=items, backend=backend, **options)
        out.loss.backward()
        assert out.loss == 0 and out.hard == 0 and out.soft == 0 and logits.grad.abs().max() == 0
        out, grad = camkd_loss_and_grad(
            logits, teachers, target, num_items=items, loss_scale=torch.tensor(8.0), backend=backend, **options
        )
        assert out.loss == 0 and grad.abs().max() == 0


def test_no_items_but_rows_give_no_finite_number(x, backend):
    # 1 / 0 would hide a wrong count if it were replaced.
    student, teachers, target = x
    assert camkd_loss(student, teachers, target, num_items=torch.tensor(0), backend=backend).loss.isinf()


@pytest.mark.parametrize("items", [torch.tensor(0), torch.tensor(0.0), torch.tensor([0])])
def test_no_items_and_no_rows_give_a_feature_loss_of_zero(items, backend):
    module, head = CAMKDFeatureLoss(3, [4], backend=backend), nn.Sequential(nn.Flatten(), nn.Linear(16, C))
    head.requires_grad_(False)
    student, teacher = torch.randn(N, 3, 2, 2, requires_grad=True), torch.randn(N, 4, 2, 2)
    out = module(student, [teacher], [head], torch.full((N,), -100), num_items=items)
    out.loss.sum().backward()
    assert out.loss == 0 and student.grad.abs().max() == 0
    with pytest.raises(ValueError, match="num_items must be finite and > 0, got 0"):
        module(student, [teacher], [head], torch.zeros(N, dtype=torch.int64), num_items=0)
