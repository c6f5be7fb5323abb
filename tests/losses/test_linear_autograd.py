"""The linear loss under autograd, autocast and torch.compile, and its operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from camkd_fast import camkd_linear_loss
from camkd_fast.losses import linear_op
from tests.support.linear_cases import (
    LinearResult,
    evaluate,
    make_linear_case,
    run,
    unfused,
)
from tests.support.tolerance import assert_near, unit


def test_an_incoming_gradient_multiplies_all_of_them() -> None:
    case = make_linear_case(60, 30, hard_weight=1.0)
    once, scaled = run(case), run(case, torch.tensor(0.37))
    for name in ("grad_hidden", "grad_head", "grad_bias"):
        assert_near(getattr(scaled, name), 0.37 * getattr(once, name))


def test_a_gradient_is_rounded_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_linear_case(20, 30, hard_weight=1.0, dtype=torch.bfloat16)
    whole = run(case, torch.tensor(0.37))
    monkeypatch.setattr(linear_op, "_PART_BYTES", 7 * 4 * case.head.shape[1])  # rows of the head: 7, 7, ..., fewer
    parts = run(case, torch.tensor(0.37))
    assert parts.grad_head.dtype == torch.bfloat16 and parts.grad_head.any(dim=1).all()
    for name in ("grad_hidden", "grad_head", "grad_bias"):
        assert torch.equal(getattr(parts, name), getattr(whole, name)), name


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_retained_graph_can_be_used_again(reduction: str) -> None:
    case = make_linear_case(20, 30, hard_weight=1.0, reduction=reduction)
    parameters = [x.clone().requires_grad_() for x in (case.hidden, case.head, case.bias)]
    loss = evaluate(case, *parameters).loss.sum()
    first = [g.clone() for g in torch.autograd.grad(loss, parameters, retain_graph=True)]
    (2 * loss).backward(retain_graph=True)
    for parameter, gradient in zip(parameters, first, strict=True):
        assert_near(parameter.grad, 2 * gradient)
        parameter.grad.zero_()
    loss.backward()
    for parameter, gradient in zip(parameters, first, strict=True):
        assert_near(parameter.grad, gradient)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_parameter_changed_before_backward_raises(reduction: str) -> None:
    case = make_linear_case(20, 30, hard_weight=1.0, reduction=reduction)
    for changed in range(3):
        leaves = [x.clone().requires_grad_() for x in (case.hidden, case.head, case.bias)]
        parameters = [x * 1.0 for x in leaves]
        loss = evaluate(case, *parameters).loss.sum()
        with torch.no_grad():
            parameters[changed].add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_double_backward_raises() -> None:
    case = make_linear_case(20, 30)
    hidden = case.hidden.clone().requires_grad_()
    loss = evaluate(case, hidden, case.head, case.bias).loss
    with pytest.raises(RuntimeError, match="double backward through the loss is not supported"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_inputs_are_not_changed() -> None:
    case = make_linear_case(60, 30, ignored=0.3, hard_weight=1.0)
    before = case.to(torch.float64).to(torch.float32)
    run(case, chunk_rows=7)
    for name in ("hidden", "head", "bias"):
        assert torch.equal(getattr(case, name), getattr(before, name))
    assert all(torch.equal(a, b) for a, b in zip(case.teacher_hidden, before.teacher_hidden, strict=True))


def test_a_tied_head_adds_up_both_gradients() -> None:
    case = make_linear_case(40, 30, biased=False, hard_weight=1.0)
    embedding = torch.nn.Embedding(30, 8)
    tokens = torch.randint(30, (40,))

    def gradient(fused: bool) -> Tensor:
        embedding.zero_grad()
        hidden = embedding(tokens)
        if fused:
            loss = evaluate(case, hidden, embedding.weight, None).loss
        else:
            of_all = case.with_(hidden=hidden.detach(), head=embedding.weight.detach())
            R = unfused(of_all, torch.float32)
            loss = (hidden * R.grad_hidden).sum() + (embedding.weight * R.grad_head).sum()
        loss.backward()
        return embedding.weight.grad.clone()

    assert_near(gradient(True), gradient(False), 1e-5)


def test_accumulated_over_parts() -> None:
    case = make_linear_case(64, 30, hard_weight=1.0, ignored=0.2, num_items=50)
    whole, total = run(case), [0.0] * 3
    for part in range(0, 64, 16):
        rows = slice(part, part + 16)
        found = run(
            case.with_(
                hidden=case.hidden[rows], target=case.target[rows],
                teacher_hidden=tuple(h[rows] for h in case.teacher_hidden),
            )
        )  # fmt: skip
        total = [t + g for t, g in zip(total, (found.loss, found.grad_head, found.grad_bias), strict=True)]
    for ours, expected in zip(total, (whole.loss, whole.grad_head, whole.grad_bias), strict=True):
        assert_near(ours, expected, 1e-6)


# --- autocast, torch.compile, operators ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_rounds_as_linear_does(dtype: torch.dtype) -> None:
    case = make_linear_case(60, 200, (32, 48, 16), dtype, hard_weight=1.0)
    rounded = case.to(torch.bfloat16)
    expected = run(rounded)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(case.with_(head=case.head.float()) if dtype == torch.bfloat16 else case)
    for name, a, b in zip(LinearResult._fields, ours, expected, strict=True):
        assert_near(a.float(), b.float(), 2 * unit(torch.bfloat16), name)
    assert (
        ours.grad_head.dtype == torch.float32 and ours.grad_hidden.dtype == dtype and ours.loss.dtype == torch.float32
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled(reduction: str) -> None:
    torch._dynamo.reset()
    case = make_linear_case(40, 30, ignored=0.2, hard_weight=1.0, reduction=reduction)

    def loss(hidden: Tensor, head: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        out = evaluate(case, hidden, head, bias)
        assert out.entropy is not None
        return out.loss, out.entropy

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    results = []
    for function in (loss, compiled):
        parameters = [x.clone().requires_grad_() for x in (case.hidden, case.head, case.bias)]
        value, entropy = function(*parameters)
        (0.5 * value).sum().backward()
        results.append([value.detach(), entropy.detach(), *(x.grad for x in parameters)])
    for a, b in zip(*results, strict=True):
        assert_near(a, b)


@pytest.mark.parametrize(
    ("changes", "reduction"),
    [("rows", "mean"), ("rows", "none"), ("num_items", "mean"), ("num_valid", "mean"), ("num_valid", "none")],
)
def test_few_recompilations(changes: str, reduction: str) -> None:
    """Sentences have lengths of their own, and batches a number of tokens, which Trainer counts."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def loss(hidden: Tensor, head: Tensor, teachers: list[Tensor], target: Tensor, number: int) -> Tensor:
        settings: dict[str, Any] = {} if changes == "rows" else {changes: number}
        return camkd_linear_loss(hidden, head, teachers, heads, target, reduction=reduction, **settings).loss

    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    heads = [torch.randn(30, 4), torch.randn(30, 4)]
    for number in range(24, 36):
        rows = number if changes == "rows" else 24
        parameters = [torch.randn(rows, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)]
        others = ([torch.randn(rows, 4), torch.randn(rows, 4)], torch.randint(30, (rows,)), number)
        found = []
        for function in (compiled, loss):
            value = function(*parameters, *others)
            found.append((value.detach(), *torch.autograd.grad(value.sum(), parameters)))
        for ours, expected in zip(*found, strict=True):
            assert_near(ours, expected)
    assert counter.frame_count <= 2, f"compiled {counter.frame_count} times"


@pytest.mark.parametrize("name", ["linear_loss", "linear_loss_rows", "linear_loss_rows_backward"])
@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False)])
def test_opcheck(name: str, needs: tuple[bool, ...]) -> None:
    check_operator(name, needs)


def check_operator(name: str, needs: tuple[bool, ...], shard: tuple[Any, ...] = (None, 0, False)) -> None:
    """`shard`: group, first class, and whether the gradient of the hidden states is added up."""
    case = make_linear_case(12, 9, ignored=0.2, hard_weight=1.0)
    formula = [1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    parameters = [
        x.clone().requires_grad_(wanted) for x, wanted in zip((case.hidden, case.head, case.bias), needs, strict=True)
    ]
    arguments: list[Any] = [
        *(*parameters, list(case.teacher_hidden), list(case.teacher_heads), list(case.teacher_biases), case.target, 9),
        *(formula, "confidence", "forward_kl", -100, None, None, None, 5, 1e9, None, *shard, "auto", list(needs)),
    ]
    if name == "linear_loss":
        arguments += [0.25, None]
    elif name == "linear_loss_rows_backward":
        arguments = [x.detach() if isinstance(x, Tensor) else x for x in arguments] + [torch.randn(12)]
    torch.library.opcheck(getattr(torch.ops.camkd_fast, name), tuple(arguments))


def test_frozen_models_have_no_graph() -> None:
    case = make_linear_case(12, 9)
    assert not evaluate(case, case.hidden, case.head, case.bias).loss.requires_grad
    with torch.no_grad():
        assert not evaluate(case, case.hidden.requires_grad_(), case.head, case.bias).loss.requires_grad


# --- calls without numbers, and calls that are recorded ---------------------------------------------------------------


def test_tensors_with_shapes_only() -> None:
    case = make_linear_case(8, 10)
    parameters = [x.clone().requires_grad_() for x in (case.hidden, case.head, case.bias)]
    with FakeTensorMode() as mode:
        student = [mode.from_tensor(x) for x in parameters]
        fake = {
            name: tuple(x if x is None else mode.from_tensor(x) for x in getattr(case, name))
            for name in ("teacher_hidden", "teacher_heads", "teacher_biases")
        }
        loss = evaluate(case.with_(target=mode.from_tensor(case.target), **fake), *student).loss
        gradients = torch.autograd.grad(loss, student)
    assert loss.shape == () and [g.shape for g in gradients] == [x.shape for x in student]
    meta = case.with_(
        target=case.target.to("meta"),
        **{name: tuple(x if x is None else x.to("meta") for x in getattr(case, name)) for name in fake},
    )
    assert evaluate(meta, *(x.to("meta") for x in (case.hidden, case.head, case.bias))).loss.is_meta


@pytest.mark.parametrize("num_items", [None, torch.tensor(5.0)], ids=["rows", "num_items"])
def test_a_trace_counts_the_labels_of_each_call(num_items: Tensor | None) -> None:
    case = make_linear_case(8, 10, num_items=num_items)

    def loss_of(target: Tensor) -> Tensor:
        return evaluate(case.with_(target=target), case.hidden, case.head, case.bias).loss

    traced = make_fx(loss_of)(case.target)
    other = case.target.clone()
    other[:4] = -100
    assert_near(traced(other), loss_of(other))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_teachers_of_inference_mode(reduction: str) -> None:
    case = make_linear_case(20, 30, hard_weight=1.0, reduction=reduction)
    grad_output = torch.rand(20) if reduction == "none" else None
    with torch.inference_mode():
        hiddens = tuple(hidden.clone() for hidden in case.teacher_hidden)
        weights = torch.rand(2, 20)
    for weighting in ("confidence", weights):
        inference = case.with_(teacher_hidden=hiddens, weighting=weighting)
        expected = case.with_(weighting=weighting if isinstance(weighting, str) else weighting.clone())
        for ours, theirs in zip(run(inference, grad_output), run(expected, grad_output), strict=True):
            assert ours is None or torch.equal(ours, theirs)


@pytest.mark.parametrize("num_items", [None, 3.0, torch.tensor(3.0)], ids=["rows", "number", "tensor"])
def test_the_loss_may_be_changed_in_place(num_items: float | Tensor | None) -> None:
    case = make_linear_case(20, 30, num_items=num_items)
    parameters = [x.clone().requires_grad_() for x in (case.hidden, case.head, case.bias)]
    loss = evaluate(case, *parameters).loss
    loss *= 2
    for g, expected in zip(torch.autograd.grad(loss, parameters), run(case, torch.tensor(2.0))[-3:], strict=True):
        assert torch.equal(g, expected)


def test_an_empty_batch_takes_a_factor() -> None:
    case = make_linear_case(0, 30)
    found = run(case, torch.tensor(0.25))
    assert found.loss == 0 and found.grad_hidden.shape == case.hidden.shape and not found.grad_head.any()


def test_transforms_are_refused() -> None:
    case = make_linear_case(8, 10)

    def loss_of(hidden: Tensor) -> Tensor:
        return evaluate(case, hidden, case.head, case.bias).loss

    with pytest.raises(NotImplementedError, match=r"in a torch.func transform: make the logits and call camkd_loss"):
        torch.func.grad(loss_of)(case.hidden)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="in forward-mode differentiation"):
        loss_of(forward_ad.make_dual(case.hidden, case.hidden))
