"""Tensors that are no dense memory, and calls in modes and transforms: the right value, or an error that says why."""

import contextlib

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from camkd_fast import (
    CAMKDFeatureLoss,
    CAMKDLoss,
    camkd_feature_loss_and_grad,
    camkd_loss,
    camkd_loss_and_grad,
    confidence_weights,
    weighted_feature_loss,
)
from camkd_fast.backends.dispatch import availability
from tests.support.tensor_kinds import CALLS, FLOATING, REFUSED, VALUES, dense
from tests.support.tolerance import assert_near

N, C = 6, 10

compiled = pytest.mark.skipif(not availability("cpu").usable, reason="no compiled module")


def inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    student, first, second, other = (torch.randn(N, C, generator=g) for _ in range(4))
    target = torch.randint(C, (N,), generator=g)
    target[1 + seed] = -100
    return {
        "student": student,
        "first": first,
        "second": second,
        "other": other,
        "target": target,
        "second_target": (target + 1).clamp(min=0) % C,
        "mix": torch.rand(N, generator=g),
        "weights": torch.rand(2, N, generator=g),
    }


def mean(student, first, second, target, **_):
    return camkd_loss(student, [first, second], target).loss


def rows(student, first, second, target, weights, **_):
    return camkd_loss(student, (first, second), target, weighting=weights, reduction="none").loss


ITEMS = torch.tensor(3)


def per_items(student, first, second, target, **_):
    return camkd_loss(student, [first, second], target, weighting="entropy", num_items=ITEMS).loss


def value_and_grad(student, first, second, target, **_):
    return camkd_loss_and_grad(student, [first, second], target, loss_scale=2.0)[1]


def two_labels(student, first, target, second_target, mix, **_):
    return camkd_loss(student, [first], target, second_target=second_target, mix=mix).loss


def confidence_of_two_labels(student, first, target, second_target, mix, **_):
    return confidence_weights([student, first], target, second_target=second_target, mix=mix)[0]


def confidence(student, first, target, **_):
    return confidence_weights([student, first], target)[0]


def feature(student, first, second, other, weights, **_):
    return weighted_feature_loss([student, other], [first, second], weights, reduction="none")


def feature_and_grad(student, first, second, other, target, weights, **_):
    given = [student, other], [first, second], None, target
    return camkd_feature_loss_and_grad(*given, weighting=weights, loss_scale=2.0)[1][0]


ALL = (
    mean,
    rows,
    per_items,
    value_and_grad,
    two_labels,
    confidence,
    confidence_of_two_labels,
    feature,
    feature_and_grad,
)
FUNCTIONS = {function.__name__: function for function in ALL}
DIFFERENTIABLE = [name for name in FUNCTIONS if not name.endswith("and_grad")]
USED = {
    "mean": ("student", "first", "target"),
    "rows": ("student", "second", "target", "weights"),
    "per_items": ("student", "first", "target"),
    "value_and_grad": ("student", "first", "target"),
    "two_labels": ("second_target", "mix"),
    "confidence": ("student", "first", "target"),
    "confidence_of_two_labels": ("second_target", "mix"),
    "feature": ("student", "first", "weights"),
    "feature_and_grad": ("student", "first", "target", "weights"),
}
EVERY_ARGUMENT = [(name, argument) for name, arguments in USED.items() for argument in arguments]


def scalar(name, x):
    """A scalar that depends on every result of a function."""
    result = FUNCTIONS[name](**x)
    return (result * torch.linspace(1, 2, result.numel()).view(result.shape)).sum()


def student_gradient(name, x):
    student = x["student"].detach().clone().requires_grad_()
    scalar(name, x | {"student": student}).backward()
    return student.grad


def assert_same_sum(actual, terms):
    """A sum that may cancel, to 16 units of the sum of its absolute terms."""
    error, allowed = (actual - terms.sum()).abs(), 16 * torch.finfo(torch.float32).eps * terms.abs().sum()
    assert error <= allowed, f"{actual} instead of {terms.sum()}, allowed {allowed}"


@pytest.mark.parametrize(
    ("name", "argument", "kind"),
    [
        (name, argument, kind)
        for name, argument in EVERY_ARGUMENT
        for kind in (*VALUES, *FLOATING)
        if not argument.endswith("target") or kind in VALUES  # labels are integers
    ],
)
def test_the_values_are_those_of_the_dense_tensor(name, argument, kind):
    x = inputs()
    expected = FUNCTIONS[name](**x)
    given = (VALUES | FLOATING)[kind](x[argument])
    assert_near(dense(FUNCTIONS[name](**x | {argument: given})), expected)


@pytest.mark.parametrize(
    "kind",
    [kind for kind in (*VALUES, *FLOATING) if kind not in ("inference", "functionalised", "functionalised view")],
)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_the_gradient_of_the_student_is_that_of_the_dense_tensor(name, kind):
    x = inputs()
    expected = student_gradient(name, x)
    student = (VALUES | FLOATING)[kind](x["student"]).requires_grad_()
    scalar(name, x | {"student": student}).backward()
    assert_near(dense(student.grad), expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_zero_tensor_without_memory_counts_as_zeros(name):
    x = inputs()
    for argument in ("student", "first"):
        zeros = FUNCTIONS[name](**x | {argument: torch.zeros(N, C)})
        assert_near(FUNCTIONS[name](**x | {argument: torch._efficientzerotensor(N, C)}), zeros)


NOT_OF_LABELS = ("mkldnn", "quantised", "sparse_csr", "sparse_csc")  # PyTorch has no such integers or vectors


@pytest.mark.parametrize(
    ("name", "argument", "kind"),
    [
        (name, argument, kind)
        for name, argument in EVERY_ARGUMENT
        for kind in REFUSED
        if not (argument.endswith("target") and kind in NOT_OF_LABELS)
        and not (argument == "mix" and kind in ("sparse_csr", "sparse_csc"))
        and (name, argument, kind) != ("feature", "weights", "MaskedTensor")  # PyTorch multiplies by it
    ],
)
def test_other_sorts_are_refused_by_name(name, argument, kind):
    x = inputs()
    given = REFUSED[kind](x[argument])
    with pytest.raises(TypeError, match=kind):
        FUNCTIONS[name](**x | {argument: given})


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("half", [False, True])
def test_a_call_gives_the_same_in_every_circumstance(name, call, half):
    x = inputs()
    if half:
        x = {key: value.half() if value.is_floating_point() else value for key, value in x.items()}
    expected, gradient = FUNCTIONS[name](**x), student_gradient(name, x) if name in DIFFERENTIABLE else None
    with CALLS[call]():
        assert_near(FUNCTIONS[name](**x), expected, 1e-3 if half else None)
    if gradient is None:
        return
    student = x["student"].clone().requires_grad_()
    ones = torch.linspace(1, 2, expected.numel()).view(expected.shape)
    with CALLS[call]():
        (FUNCTIONS[name](**x | {"student": student}) * ones).sum().backward()
    assert_near(student.grad, gradient, 2e-3 if half else None)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_torch_func(name):
    x = inputs()

    def f(student):
        return scalar(name, x | {"student": student})

    s, expected = x["student"], student_gradient(name, x)
    for transform in (grad, jacrev, jacfwd):
        assert_near(transform(f)(s), expected)
    assert_same_sum(jvp(f, (s,), (x["other"],))[1], expected * x["other"])
    assert_near(functionalize(f)(s), f(s))
    batch = torch.stack([s, x["other"], x["first"]])
    assert_near(vmap(f)(batch), torch.stack([f(row) for row in batch]), 4e-6)
    assert_near(vmap(grad(f))(batch), torch.stack([student_gradient(name, x | {"student": row}) for row in batch]))
    H = hessian(f)(s).reshape(N * C, N * C)
    assert_near(H, H.T)
    step = 1e-2 * x["other"]
    difference = (grad(f)(s + step) - grad(f)(s - step)) / 2
    assert_near((H @ step.flatten()).view(N, C), difference, 1e-2)


def test_torch_func_over_samples():
    x = inputs()
    target = x["target"].clamp(min=0)
    losses = camkd_loss(x["student"], [x["first"]], target, reduction="none").loss

    def one(student, first, label):
        return camkd_loss(student, [first], label).loss

    assert_near(vmap(one)(x["student"], x["first"], target), losses)
    per_sample = vmap(grad(one))(x["student"], x["first"], target)
    assert_near(per_sample, camkd_loss_and_grad(x["student"], [x["first"]], target, reduction="none")[1])
    gradients = vmap(lambda s: camkd_loss_and_grad(s, [x["first"]], target)[1])(x["student"].expand(3, N, C))
    assert_near(gradients[2], camkd_loss_and_grad(x["student"], [x["first"]], target)[1])


def test_torch_func_by_given_weights():
    x = inputs()
    learned = torch.tensor([0.0, 0.7], requires_grad=True)
    camkd_loss(x["student"], [x["first"], x["second"]], x["target"], weighting=learned).loss.backward()
    by_func = grad(lambda w: camkd_loss(x["student"], [x["first"], x["second"]], x["target"], weighting=w).loss)
    assert_near(by_func(learned.detach()), learned.grad)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_forward_mode(name):
    x = inputs()
    expected = student_gradient(name, x) * x["other"]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x["student"], x["other"])
        assert_same_sum(forward_ad.unpack_dual(scalar(name, x | {"student": dual})).tangent, expected)


@pytest.mark.parametrize(
    ("name", "trace"),
    [(name, trace) for name in FUNCTIONS for trace in ("make_fx", "jit")]
    + [(name, "make_fx of grad") for name in DIFFERENTIABLE],
)
def test_a_trace_is_right_for_other_inputs(name, trace):
    x, other = inputs(), inputs(seed=1)
    other["target"][3:] = -100
    names = tuple(x)

    def value(*tensors):
        return FUNCTIONS[name](**dict(zip(names, tensors, strict=True)))

    def gradient(*tensors):
        x = dict(zip(names, tensors, strict=True))
        student = x["student"].clone().requires_grad_()
        return torch.autograd.grad(scalar(name, x | {"student": student}), student)[0]

    if trace == "jit":
        with contextlib.suppress(DeprecationWarning):
            traced = torch.jit.trace(value, tuple(x.values()), check_trace=False)
        assert_near(traced(*other.values()), value(*other.values()))
        return
    function = value if trace == "make_fx" else gradient
    traced = make_fx(function)(*x.values())
    assert_near(traced(*other.values()), function(*other.values()))


@pytest.mark.parametrize("retain_graph", [True, False])
@pytest.mark.parametrize("name", ["mean", "rows", "confidence", "feature"])
def test_a_trace_of_a_backward_is_right_for_other_gradients(name, retain_graph):
    x = inputs()
    student = x["student"].requires_grad_()
    result = FUNCTIONS[name](**x)
    g = torch.linspace(-1, 2, result.numel()).view(result.shape)
    (expected,) = torch.autograd.grad(FUNCTIONS[name](**x), student, g)
    # Traced with ones, by which backward need not multiply.
    traced = make_fx(lambda g: torch.autograd.grad(result, student, g, retain_graph=retain_graph)[0])
    graph = traced(torch.ones_like(result))
    for _ in range(2):
        assert_near(graph(g), expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_fake_tensors(name):
    x = inputs()
    expected = FUNCTIONS[name](**x)
    mode = FakeTensorMode()
    fakes = {key: mode.from_tensor(value) for key, value in x.items()}
    for context in (contextlib.nullcontext(), mode):
        with context:
            if name == "per_items" and context is not mode:
                continue  # its num_items is no fake tensor
            result = FUNCTIONS[name](**fakes)
        assert isinstance(result, FakeTensor)
        assert result.shape == expected.shape and result.dtype == expected.dtype


@pytest.mark.parametrize("name", ["mean", "rows", "confidence", "feature"])
def test_batched_gradients(name):
    x = inputs()
    student = x["student"].requires_grad_()
    result = FUNCTIONS[name](**x)
    g = torch.randn(3, *result.shape)
    (batched,) = torch.autograd.grad(result, student, g, retain_graph=True, is_grads_batched=True)
    single = [torch.autograd.grad(result, student, row, retain_graph=True)[0] for row in g]
    assert_near(batched, torch.stack(single))


@compiled
def test_a_named_backend_refuses_what_is_no_dense_memory():
    x = inputs()
    for kind in ("wrapper subclass", "functionalised"):
        with pytest.raises(NotImplementedError, match=r"'cpu' cannot run here: it takes dense tensors, got a"):
            camkd_loss(VALUES[kind](x["student"]), [x["first"]], x["target"], backend="cpu")
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        grad(lambda s: camkd_loss(s, [x["first"]], x["target"], backend="cpu").loss)(x["student"])
    with pytest.raises(NotImplementedError, match=r"dense tensors"):
        weighted_feature_loss([VALUES["wrapper subclass"](x["student"])], [x["first"]], torch.ones(1, N), backend="cpu")


def test_torch_compile_of_transforms():
    x = inputs()
    s = x["student"]

    def f(student):
        return mean(**x | {"student": student})

    def compiled_call(function, argument):
        torch._dynamo.reset()
        return torch.compile(function, backend="aot_eager")(argument)

    assert_near(compiled_call(lambda a: grad(f)(a), s), student_gradient("mean", x))
    assert_near(compiled_call(lambda a: vmap(f)(a), s.expand(2, N, C)), f(s).expand(2))
    assert_near(compiled_call(f, VALUES["negated"](s)), f(s))


def test_modules_take_the_same_ways():
    x = inputs()
    criterion = CAMKDLoss()
    expected = criterion(x["student"], [x["first"]], x["target"]).loss
    assert_near(criterion(VALUES["negated"](x["student"]), [x["first"]], x["target"]).loss, expected)
    maps, head = torch.randn(N, 4, 2, 2), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, C))
    module = CAMKDFeatureLoss(3, [4]).eval()
    student = torch.randn(N, 3, 2, 2)
    head.requires_grad_(False)
    call = lambda s, f: module(s, [f], [head], x["target"]).loss  # noqa: E731
    expected = call(student, maps)
    assert_near(call(student, VALUES["negated"](maps)), expected)
    with CALLS["default device meta"]():
        assert_near(call(student, maps), expected)
    assert_near(vmap(lambda f: call(student, f))(maps.expand(2, *maps.shape))[1], expected)
    with pytest.raises(TypeError, match="mkldnn"):
        call(student, maps.to_mkldnn())
