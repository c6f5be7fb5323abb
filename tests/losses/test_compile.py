"""torch.compile and the registered ops: opcheck, fullgraph, few recompilations."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import camkd_fast  # noqa: F401  # registers the ops
from camkd_fast import (
    CAMKDFeatureLoss,
    camkd_linear_loss,
    camkd_loss,
    camkd_loss_and_grad,
    confidence_weights,
    weighted_feature_loss,
)
from camkd_fast.losses.formula import Formula
from tests.support.cases import make_case
from tests.support.evaluate import fields, run
from tests.support.tolerance import assert_accurate, assert_near
from tests.support.truth import naive, truth

OPS = torch.ops.camkd_fast


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def op_arguments(backend, lead=(6,), **changes):
    case = make_case(6, 10, lead=lead, padded=False, ignored=0.3)
    formula = Formula(**{name: changes.pop(name) for name in Formula._fields if name in changes and name in EXTENDED})
    constants, _, divergence, _ = formula.checked(3).constants()
    arguments = {
        "student": case.student.requires_grad_(),
        "teachers": list(case.teachers),
        "target": case.target,
        "second_target": None,
        "mix": None,
        "weights": None,
        "grad_scale": None,
        "constants": constants,
        "weighting": "confidence",
        "divergence": divergence,
        "ignore_index": -100,
        "needs_grad": True,
        "backend": backend,
    }
    return tuple((arguments | changes).values())


EXTENDED = {"divergence", "student_softcap", "teacher_logit_scales", "entropy"}
TWO_LABELS = {"second_target": torch.arange(6), "mix": torch.linspace(0, 1, 6)}
ROW_LOSS = {
    "defaults": {},
    "no gradient": {"needs_grad": False, "student": torch.randn(6, 10)},
    "scaled": {"grad_scale": torch.tensor([0.25])},
    "entropy": {"weighting": "entropy"},
    "given weights": {"weights": torch.rand(3, 6).requires_grad_(), "weighting": "uniform"},
    "bfloat16": {"student": torch.randn(6, 10).bfloat16().requires_grad_()},
    "tokens": {"lead": (2, 3)},
    "two labels": TWO_LABELS,
    "two labels of tokens": {"lead": (2, 3)} | {name: value.view(2, 3) for name, value in TWO_LABELS.items()},
    "another divergence": {"divergence": ("jsd", 0.3), "student_softcap": 5.0, "teacher_logit_scales": (1.0, 2.0, 0.5)},
    "entropies of the student": {"entropy": True},
    "padded rows": {"student": torch.randn(6, 13)[:, :10].detach().requires_grad_()},
}


@pytest.mark.parametrize("what", ROW_LOSS)
def test_opcheck_row_loss(what, backend):
    torch.library.opcheck(OPS.row_loss.default, op_arguments(backend, **ROW_LOSS[what]))


@pytest.mark.parametrize("K", [1, 3])
def test_opcheck_confidence_weights(K, backend):
    case = make_case(6, 10, K, ignored=0.3)
    logits = [z.detach().clone().requires_grad_() for z in case.teachers]
    for second in ((None, None), tuple(TWO_LABELS.values())):
        labels = (case.target, *second)
        torch.library.opcheck(OPS.confidence_weights.default, (logits, *labels, -100, backend))
        constants = [z.detach() for z in logits]
        _, _, lse = OPS.confidence_weights(constants, *labels, -100, backend)
        arguments = (constants, *labels, lse, torch.randn(K, 6), backend)
        torch.library.opcheck(OPS.confidence_weights_backward.default, arguments)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_opcheck_feature_error(format, backend):
    shapes = [(3, 4, 2, 5), (3, 6, 3, 3)]
    student, teachers = ([torch.randn(s).contiguous(memory_format=format) for s in shapes] for _ in range(2))
    trained = [r.clone().requires_grad_() for r in student]
    torch.library.opcheck(OPS.feature_error.default, (trained, teachers, backend))
    torch.library.opcheck(OPS.feature_error_backward.default, (student, teachers, torch.randn(2, 3), backend))


@pytest.mark.parametrize(
    "scales", [(None, None), (torch.tensor([0.5]), torch.tensor([8.0]))], ids=["numbers", "tensors"]
)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_opcheck_feature_loss(format, scales, backend):
    shapes = [(3, 4, 2, 5), (3, 6, 3, 3)]
    student = [torch.randn(s).contiguous(memory_format=format) for s in shapes]
    teachers = [torch.randn(s).bfloat16() for s in shapes]
    arguments = (student, teachers, torch.rand(2, 3), *scales, [0.5, 8.0], backend)
    torch.library.opcheck(OPS.feature_loss.default, arguments)


def test_every_registered_op_is_checked():
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("camkd_fast::")
    }
    checked = {
        "row_loss",
        "confidence_weights",
        "confidence_weights_backward",
        "feature_error",
        "feature_error_backward",
        "feature_loss",
        *("linear_loss", "linear_loss_rows", "linear_loss_rows_backward"),  # checked in test_linear_autograd.py
        "min_norm_weights",  # checked in test_min_norm.py; registered when losses.min_norm is imported
    }
    assert registered >= checked - {"min_norm_weights"} and registered <= checked


# --- whole functions -------------------------------------------------------------------------------------------------

CASES = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "entropy": {"weighting": "entropy", "temperature": 2.0},
    "per row": {"weighting": torch.rand(3, 16)},
    "num_items": {"num_items": 5},
    "num_items tensor": {"num_items": torch.tensor(5)},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "ignored": {"ignored": 0.5},
    "two labels": {"ignored": 0.3, "two_labels": True},
}


@pytest.mark.parametrize("what", CASES)
def test_fullgraph_equals_eager(what, backend):
    case = make_case(16, 33, **CASES[what])
    grad_output = torch.randn(16) if case.reduction == "none" else torch.tensor(1.7)
    expected = run(case, backend, grad_output)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(student, teachers, target, **tensors):
        return camkd_loss(student, teachers, target, backend=backend, **(case.options() | tensors))

    student = case.student.detach().requires_grad_()
    weighting, second = case.weighting, {"second_target": case.second_target, "mix": case.mix}
    if isinstance(weighting, torch.Tensor):
        weighting = weighting.detach().requires_grad_()
    out = compiled(student, list(case.teachers), case.target, weighting=weighting, **second)
    assert [x.requires_grad for x in fields(out)] == [True, False, False, False, False, False]
    out.loss.backward(grad_output)
    for ours, eager in zip(fields(out), expected[:6], strict=True):
        assert_near(ours.detach(), eager, rtol=1e-6)
    assert_accurate(student.grad, truth(case, grad_output).grad, naive(case, grad_output).grad)
    if expected.grad_weighting is not None:
        assert_near(weighting.grad, expected.grad_weighting)


@pytest.mark.parametrize("what", ["mean", "none", "num_items tensor", "bfloat16", "two labels"])
def test_loss_and_grad_fullgraph_equals_eager(what, backend):
    case = make_case(16, 33, **CASES[what])
    scale = torch.tensor(64.0)

    def function(student, teachers, target, scale, second_target, mix):
        options = case.options() | {"second_target": second_target, "mix": mix}
        return camkd_loss_and_grad(student, teachers, target, loss_scale=scale, backend=backend, **options)

    arguments = (case.student, list(case.teachers), case.target, scale, case.second_target, case.mix)
    out, grad = torch.compile(function, backend="aot_eager", fullgraph=True)(*arguments)
    expected, expected_grad = function(*arguments)
    for ours, eager in zip((*fields(out), grad), (*fields(expected), expected_grad), strict=True):
        assert_near(ours, eager)


@pytest.mark.parametrize("shape", [(3,), (3, 16)], ids=["per teacher", "per row"])
def test_loss_and_grad_records_no_graph_for_learned_weights(shape, backend):
    case = make_case(16, 33, weighting=torch.rand(shape).requires_grad_())

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(student, teachers, target, weighting):
        return camkd_loss_and_grad(student, teachers, target, weighting=weighting, backend=backend)

    student = case.student.detach().requires_grad_()
    out, grad = compiled(student, list(case.teachers), case.target, case.weighting)
    assert not any(x.requires_grad for x in (*fields(out), grad))
    detached = case.with_(weighting=case.weighting.detach())
    assert_accurate(grad, truth(detached).grad, naive(detached).grad)


@pytest.mark.parametrize("shape", ["(N, C)", "(B, S, C)"])
def test_few_recompilations_over_batch_sizes(shape, backend):
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def step(student, teachers, target):
        return camkd_loss(student, teachers, target, backend=backend).loss

    for N in (32, 17, 64, 9, 33, 128, 5, 48, 31, 2):
        case = make_case(N, 33, lead=(N,) if shape == "(N, C)" else (N, 1), padded=False)
        student = case.student.detach().requires_grad_()
        loss = step(student, list(case.teachers), case.target)
        loss.backward()
        assert_near(loss.detach(), truth(case).loss.float())
    assert counter.frame_count <= 3, f"compiled {counter.frame_count} times for 10 batch sizes"


SETTINGS = {
    "temperature": 3.0, "hard_weight": 0.5, "soft_weight": 2.0, "weighting": "uniform", "ignore_index": -1,
    "divergence": ("jsd", 0.5), "scale_by_t2": False, "z_loss_weight": 0.1, "student_logit_scale": 0.5,
    "student_softcap": 9.0, "teacher_logit_scales": [0.5, 0.5, 2.0], "teacher_softcaps": [9.0, 9.0, 9.0],
    "entropy": True,
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("function", [camkd_loss, camkd_linear_loss])
def test_every_setting_with_dynamic_numbers(function, name):
    """A trace whose floats are symbols must not make one of a flag."""
    torch._dynamo.reset()
    assert set(SETTINGS) == set(Formula._fields)
    case = make_case(8, 33, padded=False)
    given = case.student, list(case.teachers)
    if function is camkd_linear_loss:
        head = torch.eye(33)
        given = case.student, head, list(case.teachers), [head] * 3

    def loss(*tensors):
        return function(*tensors, case.target, **{name: SETTINGS[name]}).loss

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    assert_near(compiled(*given), loss(*given))


def test_inductor_gives_the_eager_gradient(backend):
    # The only run through the code generator. The tests above stop at the graph, which is what this package controls.
    torch.manual_seed(0)
    case = make_case(16, 33)
    body, twin = (torch.nn.Linear(33, 33) for _ in range(2))
    twin.load_state_dict(body.state_dict())

    def step(model):
        out = camkd_loss(model(case.student).relu(), case.teachers, case.target, backend=backend)
        return out.loss * 2 + out.hard

    torch.compile(step, fullgraph=True)(body).backward()
    step(twin).backward()
    assert_near(body.weight.grad, twin.weight.grad)


def test_double_backward_is_refused_when_compiled(backend):
    case = make_case(16, 33)
    student = case.student.detach().requires_grad_()
    function = torch.compile(
        lambda s: camkd_loss(s, case.teachers, case.target, backend=backend).loss, backend="aot_eager", fullgraph=True
    )
    (grad,) = torch.autograd.grad(function(student), student, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward|does not require grad"):
        grad.square().sum().backward()


def test_labels_are_checked_when_compiled(backend):
    case = make_case(16, 33)
    function = torch.compile(
        lambda target: camkd_loss(case.student, case.teachers, target, backend=backend).loss,
        backend="aot_eager",
        fullgraph=True,
    )
    with pytest.raises(ValueError, match="label 33, but there are 33 classes"):
        function(case.target.masked_fill(case.target == case.target[0], 33))


@pytest.mark.parametrize("two_labels", [False, True])
def test_feature_losses_fullgraph_equal_eager(two_labels, backend):
    case = make_case(4, 10, 2, two_labels=two_labels)
    second = {"second_target": case.second_target, "mix": case.mix}
    student = [torch.randn(4, 6, 3, 3), torch.randn(4, 8, 2, 2)]
    teachers = [torch.randn(4, 6, 3, 3), torch.randn(4, 8, 2, 2)]

    def function(logits, features):
        weights, ce = confidence_weights(logits, case.target, backend=backend, **second)
        return weighted_feature_loss(features, teachers, weights, backend=backend) + ce.mean()

    gradients = []
    for call in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        logits = [z.detach().clone().requires_grad_() for z in case.teachers]
        features = [r.clone().requires_grad_() for r in student]
        call(logits, features).backward()
        gradients.append([x.grad for x in (*logits, *features)])
    for eager, compiled in zip(*gradients, strict=True):
        assert_near(compiled, eager)


def test_feature_module_fullgraph_equals_eager(backend):
    torch.manual_seed(0)
    module = CAMKDFeatureLoss(5, [6, 8], backend=backend)
    heads = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(n, 10)).requires_grad_(False) for n in (54, 32)]
    student, target = torch.randn(4, 5, 4, 4), torch.tensor([1, 2, 3, 4])
    teachers = [torch.randn(4, 6, 3, 3), torch.randn(4, 8, 2, 2)]
    eager = module(student, teachers, heads, target)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)(student, teachers, heads, target)
    for ours, expected in zip(compiled, eager, strict=True):
        assert_near(ours, expected)
