"""Confidence weights (eq. 3) and the weighted feature loss (eq. 5 and 6) against float64."""

import pytest
import torch
from torch import nn

from camkd_fast import camkd_loss, confidence_weights, weighted_feature_loss
from tests.support.cases import make_case
from tests.support.tolerance import FEW, assert_accurate, assert_near, rms

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def eager_weights(logits, target, ignore_index=-100):
    """Eq. 3 in the dtype of `logits`; ignored rows are 0."""
    kept = target != ignore_index
    label = torch.where(kept, target, 0)
    ce = torch.stack([nn.functional.cross_entropy(z, label, reduction="none") for z in logits])
    weights = (1 - ce.softmax(0)) / (len(logits) - 1) if len(logits) > 1 else 1 + 0 * ce
    return weights.where(kept, 0.0), ce.where(kept, 0.0)


def weights_and_gradients(logits, target, cotangents, function):
    logits = [z.detach().requires_grad_() for z in logits]
    weights, ce = function(logits, target)
    torch.autograd.backward((weights, ce), [c.to(weights.dtype) for c in cotangents])
    return [weights.detach(), ce.detach(), *(z.grad for z in logits)]


@pytest.mark.parametrize("peaked", [False, True], ids=["noise", "peaked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "C", "K"), [(64, 100, 3), (33, 1000, 2), (64, 10, 1), (33, 129, 16), (31, 1, 2)])
def test_confidence_weights_and_their_gradient(N, C, K, dtype, peaked, backend):
    case = make_case(N, C, K, dtype, peaked=peaked, ignored=0.2)
    # With larger cross-entropies the softmax over the teachers would be saturated and its gradient 0.
    logits = [z / 4 if peaked else z for z in case.teachers]
    cotangents = torch.randn(2, K, N)

    def at(precision):
        return weights_and_gradients([z.to(precision) for z in logits], case.target, cotangents, eager_weights)

    ours = weights_and_gradients(
        logits, case.target, cotangents, lambda z, y: confidence_weights(z, y, backend=backend)
    )
    # Backward rebuilds the softmax from a stored float32 log-sum-exp, whose rounding error is relative to its own size.
    # At C = 1 cross-entropy and gradient are exactly 0, and so must ours be.
    lse = max(float(z.float().logsumexp(1).abs().max()) for z in logits)
    for i, (actual, R, N_) in enumerate(zip(ours, at(torch.float64), at(torch.float32), strict=True)):
        assert_accurate(actual, R, N_, floor=0.0 if i < 2 else torch.finfo(torch.float32).eps * lse * rms(R))


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_of_one_of_the_two_results(which, backend):
    case = make_case(33, 129)
    cotangents = torch.zeros(2, 3, 33)
    cotangents[which] = torch.randn(3, 33)
    logits = [z.detach().requires_grad_() for z in case.teachers]
    (confidence_weights(logits, case.target, backend=backend)[which] * cotangents[which]).sum().backward()
    R, N = (
        weights_and_gradients([z.to(d) for z in case.teachers], case.target, cotangents, eager_weights)[2:]
        for d in (torch.float64, torch.float32)
    )
    for z, truth, eager in zip(logits, R, N, strict=True):
        assert_accurate(z.grad, truth, eager)


def test_confidence_weights_equal_those_of_the_logit_loss(backend):
    case = make_case(33, 129, peaked=True, ignored=0.3)
    out = camkd_loss(case.student, case.teachers, case.target, backend=backend)
    weights, ce = confidence_weights(case.teachers, case.target, backend=backend)
    assert_near(weights, out.weights)
    assert_near(ce, out.teacher_ce)
    stacked = confidence_weights(torch.stack(case.teachers), case.target, backend=backend)
    assert torch.equal(stacked[0], weights) and torch.equal(stacked[1], ce)


@pytest.mark.parametrize("lead", [(), (12,), (3, 4)], ids=str)
def test_confidence_weights_keep_the_leading_shape(lead, backend):
    case = make_case(int(torch.tensor(lead).prod()), 10, lead=lead)
    weights, ce = confidence_weights(case.teachers, case.target, backend=backend)
    assert weights.shape == ce.shape == (3, *lead)


def test_ignored_rows_of_confidence_weights_are_zero_even_if_nan(backend):
    case = make_case(33, 129, ignored=0.4)
    ignored = case.target == -100
    logits = [z.masked_fill(ignored.unsqueeze(1), float("nan")).requires_grad_() for z in case.teachers]
    weights, ce = confidence_weights(logits, case.target, backend=backend)
    (weights.square().sum() + ce.sum()).backward()
    assert (weights[:, ignored] == 0).all() and (ce[:, ignored] == 0).all() and weights.isfinite().all()
    for z in logits:
        assert (z.grad[ignored] == 0).all() and z.grad.isfinite().all()
    nobody = torch.full_like(case.target, -100)
    assert all((x == 0).all() for x in confidence_weights(case.teachers, nobody, backend=backend))


def test_confidence_weights_gradcheck():
    case = make_case(5, 7, 3, torch.float64, ignored=0.3)
    logits = [z.detach().clone().requires_grad_() for z in case.teachers]
    assert torch.autograd.gradcheck(lambda *z: confidence_weights(z, case.target), logits)


def test_confidence_weights_refuse_a_second_derivative(backend):
    logits = [torch.randn(4, 10, requires_grad=True) for _ in range(2)]
    weights, _ = confidence_weights(logits, torch.arange(4), backend=backend)
    with pytest.raises(RuntimeError, match="camkd_fast: double backward"):
        torch.autograd.grad(weights.square().sum(), logits[0], create_graph=True)


# --- weighted_feature_loss -------------------------------------------------------------------------------------------

SHAPES = [(6, 9, 5, 3), (6, 4, 1, 1), (6, 16, 4, 4)]


def features(dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(1)
    # Not centred and of different sizes, so that a mean over the wrong axis or a swapped teacher shows.
    student = [(torch.rand(s, generator=generator) * (k + 1)).to(dtype) for k, s in enumerate(shapes)]
    teachers = [(torch.rand(s, generator=generator) * 3 - 1).to(dtype) for s in shapes]
    return student, teachers, torch.rand(len(shapes), shapes[0][0], generator=generator)


def eager_feature_loss(student, teachers, weights, reduction):
    error = torch.stack([(r - f).square().flatten(1).mean(1) for r, f in zip(student, teachers, strict=True)])
    rows = (weights * error).sum(0)
    return rows if reduction == "none" else getattr(rows, reduction)()


def loss_and_gradients(student, teachers, weights, reduction, cotangent, function):
    leaves = [x.detach().requires_grad_() for x in (*student, weights)]
    loss = function(leaves[:-1], teachers, leaves[-1], reduction)
    loss.backward(cotangent.to(loss.dtype))
    return [loss.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_weighted_feature_loss_and_its_gradient(reduction, dtype, backend):
    student, teachers, weights = features(dtype)
    cotangent = torch.randn(6) if reduction == "none" else torch.tensor(1.3)

    def at(d):
        inputs = [x.to(d) for x in student], [x.to(d) for x in teachers], weights.to(d)
        return loss_and_gradients(*inputs, reduction, cotangent, eager_feature_loss)

    ours = loss_and_gradients(
        student, teachers, weights, reduction, cotangent, lambda *a: weighted_feature_loss(*a, backend=backend)
    )
    assert [x.dtype for x in ours] == [torch.float32, *[dtype] * 3, torch.float32]
    for actual, R, N in zip(ours, at(torch.float64), at(torch.float32), strict=True):
        # Over a few elements the error of eager may be 0 by luck: allow float32 rounding of the largest.
        floor = 1e-6 * float(R.abs().max()) if actual.numel() < FEW else 0.0
        assert_accurate(actual, R, N, floor=floor)


@pytest.mark.parametrize("mixed", [False, True], ids=["both", "student only"])
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.cat([x, x * float("nan")], 0)[: x.shape[0]],
        lambda x: torch.cat([x, x * float("nan")], 1)[:, : x.shape[1]],
        lambda x: torch.cat([x, x * float("nan")], 3)[..., : x.shape[3]],
        lambda x: x[:1].expand_as(x),
    ],
    ids=["channels_last", "transposed", "samples", "channels", "columns", "expanded"],
)
def test_features_of_any_layout(layout, mixed, backend):
    student, teachers, weights = features()
    laid_out = [layout(x) for x in student], teachers if mixed else [layout(x) for x in teachers], weights
    cotangent = torch.randn(6)

    def function(*arguments):
        return weighted_feature_loss(*arguments, backend=backend)

    ours = loss_and_gradients(*laid_out, "none", cotangent, function)
    dense = (
        [x.clone(memory_format=torch.contiguous_format) for x in laid_out[0]],
        [x.clone(memory_format=torch.contiguous_format) for x in laid_out[1]],
    )
    for actual, expected in zip(ours, loss_and_gradients(*dense, weights, "none", cotangent, function), strict=True):
        assert_near(actual, expected)


def test_features_of_other_ranks_and_mixed_teacher_dtypes(backend):
    student = [torch.rand(4, 7), torch.rand(4, 2, 3), torch.rand(4, 2, 3, 2, 2)]
    teachers = [torch.rand_like(student[0]).bfloat16(), torch.rand_like(student[1]).half(), torch.rand_like(student[2])]
    weights = torch.rand(3, 4)
    loss = weighted_feature_loss(student, teachers, weights, backend=backend)
    exact = [[x.double() for x in xs] for xs in (student, teachers)]
    assert_near(loss, eager_feature_loss(*exact, weights.double(), "mean").float())


def test_no_samples(backend):
    student = [torch.rand(0, 4, 3, 3, requires_grad=True)]
    for reduction in ("none", "sum", "mean"):
        loss = weighted_feature_loss(student, [torch.rand(0, 4, 3, 3)], torch.rand(1, 0), reduction, backend=backend)
        assert loss.shape == ((0,) if reduction == "none" else ()) and loss.sum() == 0
        loss.sum().backward()
        assert student[0].grad.shape == (0, 4, 3, 3)


def test_feature_inputs_are_bitwise_unchanged(backend):
    student, teachers, weights = features()
    before = [x.clone() for x in (*student, *teachers, weights)]
    leaves = [x.requires_grad_() for x in student]
    weighted_feature_loss(leaves, teachers, weights, backend=backend).backward()
    assert all(torch.equal(x.detach(), old) for x, old in zip((*student, *teachers, weights), before, strict=True))


def test_feature_loss_gradcheck():
    student, teachers, weights = features(torch.float64, [(3, 2, 2, 2), (3, 4, 1, 1)])
    leaves = [x.requires_grad_() for x in (*student, weights.double())]
    assert torch.autograd.gradcheck(lambda *x: weighted_feature_loss(x[:-1], teachers, x[-1], reduction="none"), leaves)


def test_feature_loss_refuses_a_second_derivative(backend):
    student, teachers, weights = features()
    leaves = [x.requires_grad_() for x in student]
    loss = weighted_feature_loss(leaves, teachers, weights, backend=backend)
    with pytest.raises(RuntimeError, match="camkd_fast: double backward"):
        torch.autograd.grad(loss, leaves, create_graph=True)
