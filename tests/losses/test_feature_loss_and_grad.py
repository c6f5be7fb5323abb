"""camkd_feature_loss_and_grad against float64 autograd and the other forms; the gradient that backward hands out."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from camkd_fast import (
    CAMKDFeatureLoss,
    camkd_feature_loss_and_grad,
    confidence_weights,
    weighted_feature_loss,
)
from tests.support.backends import BACKENDS
from tests.support.feature_cases import Maps, check, expected, make
from tests.support.op_contract import MAP_LAYOUTS
from tests.support.tensor_kinds import default_dtype
from tests.support.tolerance import assert_accurate, assert_near, rms

OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "beta": {"beta": 50.0},
    "num_items": {"num_items": 9},
    "num_items tensor": {"num_items": torch.tensor(9.0)},
    "loss_scale": {"loss_scale": 64.0},
    "loss_scale tensor": {"loss_scale": torch.tensor([64.0]), "beta": 2.0},
    "uniform": {"weighting": "uniform", "reduction": "sum"},
    "uniform mean": {"weighting": "uniform", "beta": 100.0},
    "per teacher": {"weighting": torch.tensor([0.2, 0.0, 1.5])},
    "per sample": {"weighting": torch.rand(6, 3).t(), "reduction": "none"},
    "ignore_index": {"ignore_index": 3},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("what", OPTIONS)
def test_value_and_gradient(what: str, dtype: torch.dtype, backend: str) -> None:
    maps = make(dtype)
    if what == "ignore_index":
        maps = maps._replace(target=torch.tensor([1, 3, 0, 9, 3, 3]))
    check(maps, backend, **OPTIONS[what])


@pytest.mark.parametrize("ignored", [(), (0, 1, 2, 3, 4, 5)], ids=["none", "all"])
@pytest.mark.parametrize("what", ["mean", "sum", "none", "uniform mean", "num_items tensor"])
def test_no_sample_or_every_sample_ignored(what: str, ignored: tuple[int, ...], backend: str) -> None:
    maps = make(ignored=ignored)
    check(maps, backend, **OPTIONS[what])
    if ignored:
        out, grads = camkd_feature_loss_and_grad(*maps, backend=backend, **OPTIONS[what])
        assert not out.loss.any() and not out.weights.any() and not any(grad.any() for grad in grads)


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16, torch.float32, "uniform"], ids=str)
@pytest.mark.parametrize("num_items", [None, torch.tensor(100_000)], ids=["counted", "given"])
def test_the_divisor_has_the_precision_of_the_maps(
    weights: Any, num_items: Any, default: torch.dtype, backend: str
) -> None:
    """Neither that of given weights nor the default one: 1 / 70,000 is 0 in float16."""
    maps, N = make(torch.float32), 70_000 if num_items is None else 6
    repeated = maps._replace(
        student=[r[:1].expand(N, *r.shape[1:]) for r in maps.student],
        teachers=[f[:1].expand(N, *f.shape[1:]) for f in maps.teachers],
        logits=[z[:1].expand(N, *z.shape[1:]) for z in maps.logits],
        target=maps.target[:1].expand(N),
    )
    weighting = "uniform" if weights == "uniform" else torch.full((3,), 0.5, dtype=weights)
    expected = sum((r[0] - f[0]).square().mean() for r, f in zip(maps.student, maps.teachers, strict=True))
    expected = expected / 3 if weights == "uniform" else 0.5 * expected
    with default_dtype(default):
        out, grads = camkd_feature_loss_and_grad(
            *repeated, weighting=weighting, num_items=num_items, backend=backend, beta=1.0
        )
    assert_near(out.loss, expected * (1.0 if num_items is None else N / 100_000), rtol=1e-5)
    assert all(grad.any() for grad in grads)


def test_ignored_samples_and_dropped_teachers_may_be_nan(backend: str) -> None:
    maps = make(torch.bfloat16)
    weighting = torch.tensor([[1.0], [0.0], [0.5]]).expand(3, 6)
    for k, (r, f, z) in enumerate(zip(maps.student, maps.teachers, maps.logits, strict=True)):
        r[2] = z[2] = float("nan")
        f[2] = float("inf")
        if k == 1:
            r.fill_(float("nan"))
    for options in ({"weighting": weighting}, {"weighting": weighting, "reduction": "none"}):
        out, grads = camkd_feature_loss_and_grad(*maps, backend=backend, **options)
        assert out.loss.isfinite().all() and not grads[1].any()
        assert all(grad.isfinite().all() and not grad[2].any() for grad in grads)
    maps.student[1].fill_(0.0)
    out, grads = camkd_feature_loss_and_grad(*maps, backend=backend)
    assert out.loss.isfinite() and all(grad.isfinite().all() and not grad[2].any() for grad in grads)
    leaves = [r.clone().requires_grad_() for r in maps.student]
    loss = weighted_feature_loss(leaves, maps.teachers, out.weights, backend=backend)
    loss.backward()
    assert loss.isfinite() and all(leaf.grad.isfinite().all() and not leaf.grad[2].any() for leaf in leaves)


@pytest.mark.parametrize("second", MAP_LAYOUTS)
@pytest.mark.parametrize("first", MAP_LAYOUTS)
def test_layouts(first: str, second: str, backend: str) -> None:
    maps = make(torch.float32, torch.bfloat16)
    student, teachers = [MAP_LAYOUTS[first](r) for r in maps.student], [MAP_LAYOUTS[second](f) for f in maps.teachers]
    check(maps._replace(student=student, teachers=teachers), backend)
    _, grads = camkd_feature_loss_and_grad(student, teachers, maps.logits, maps.target, backend=backend)
    if first not in ("expanded", "samples"):
        assert [grad.stride() for grad in grads] == [torch.empty_like(r).stride() for r in student]


@st.composite
def calls(draw: st.DrawFn) -> tuple[Maps, dict[str, Any]]:
    N, K = draw(st.integers(0, 5)), draw(st.integers(1, 5))
    floats = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    dtype, student, teachers = draw(floats), [], []
    for _ in range(K):
        shape = (N, *draw(st.lists(st.integers(1, 9), min_size=3, max_size=3)))
        for maps, kind in ((student, dtype), (teachers, draw(floats))):
            values = torch.randn(shape, generator=generator).to(kind)
            layouts = [name for name in MAP_LAYOUTS if N or name != "expanded"]
            maps.append(MAP_LAYOUTS[draw(st.sampled_from(layouts))](values))
    logits = [torch.randn(N, 7, generator=generator).to(draw(floats)) for _ in range(K)]
    target = torch.randint(7, (N,), generator=generator)
    target[torch.rand(N, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = -100
    reduction = draw(st.sampled_from(["mean", "sum", "none"]))
    options = {
        "reduction": reduction,
        "num_items": draw(st.sampled_from([None, 3, torch.tensor(5)])) if reduction == "mean" else None,
        "weighting": draw(st.sampled_from(["confidence", "uniform", torch.rand(K), torch.rand(K, N)])),
        "beta": draw(st.sampled_from([1.0, 50.0, 0.0])),
        "loss_scale": draw(st.sampled_from([1.0, 8.0, torch.tensor(1024.0)])),
    }
    return Maps(student, teachers, logits, target), options


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(call=calls())
def test_random_calls(backend: str, call: tuple[Maps, dict[str, Any]]) -> None:
    maps, options = call
    check(maps, backend, **options)


def test_agrees_with_the_autograd_form(backend: str) -> None:
    maps = make()
    out, grads = camkd_feature_loss_and_grad(*maps, backend=backend, loss_scale=3.0, reduction="sum")
    weights, ce = confidence_weights(maps.logits, maps.target, backend=backend)
    leaves = [r.clone().requires_grad_() for r in maps.student]
    loss = weighted_feature_loss(leaves, maps.teachers, weights, reduction="sum", backend=backend)
    (3 * loss).backward()
    assert torch.equal(out.weights, weights) and torch.equal(out.teacher_ce, ce)
    assert_near(out.loss, loss.detach())
    for leaf, grad in zip(leaves, grads, strict=True):
        assert_near(grad, leaf.grad)


def test_agrees_with_the_module(backend: str) -> None:
    torch.manual_seed(0)
    module, twin = (CAMKDFeatureLoss(3, [6, 8], backend=backend, ignore_index=1) for _ in range(2))
    twin.load_state_dict(module.state_dict())
    heads = [lambda f: f.mean((2, 3))[:, :6]] * 2
    feature, target = torch.randn(5, 3, 4, 4), torch.tensor([1, 2, 0, 5, 1])
    teachers = [torch.randn(5, 6, 4, 4), torch.randn(5, 8, 2, 2)]
    first, second = (feature.clone().requires_grad_() for _ in range(2))
    expected = twin(first, teachers, heads, target)
    (10 * expected.loss).backward()
    out, maps, grads = module.loss_and_grad(second, teachers, heads, target, beta=5.0, loss_scale=torch.tensor([2.0]))
    torch.autograd.backward(maps, grads)
    assert_near(out.loss, 5 * expected.loss.detach())
    assert torch.equal(out.weights, expected.weights) and torch.equal(out.teacher_ce, expected.teacher_ce)
    pairs = zip([second, *module.parameters()], [first, *twin.parameters()], strict=True)
    for ours, theirs in pairs:
        # Batch normalisation over 20 to 80 values amplifies float32 rounding.
        assert_near(ours.grad, theirs.grad, rtol=1e-4)


def test_float64_is_the_reference_in_float64() -> None:
    maps = make(torch.float64)
    out, grads = camkd_feature_loss_and_grad(*maps._replace(logits=[z.double() for z in maps.logits]), beta=3.0)
    for ours, true in zip([out.loss, out.weights, *grads], expected(maps, torch.float64, beta=3.0), strict=True):
        assert ours.dtype == torch.float64
        assert_near(ours, true, rtol=1e-12)


def test_no_input_is_written_and_results_have_their_own_memory(backend: str) -> None:
    maps = make()
    before = [x.clone() for x in (*maps.student, *maps.teachers, *maps.logits, maps.target)]
    out, grads = camkd_feature_loss_and_grad(*maps, backend=backend)
    for x in (out.loss, out.weights, out.teacher_ce, *grads):
        x.fill_(7.0)
    after = (*maps.student, *maps.teachers, *maps.logits, maps.target)
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_the_same_call_gives_the_same_bits(backend: str) -> None:
    maps = make(torch.bfloat16)
    first, second = (camkd_feature_loss_and_grad(*maps, backend=backend) for _ in range(2))
    assert torch.equal(first[0].loss, second[0].loss)
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize(
    "what", ["mean", "none", "num_items tensor", "loss_scale tensor", "uniform mean", "per sample"]
)
def test_fullgraph_equals_eager(what: str, backend: str) -> None:
    torch._dynamo.reset()
    maps = make(torch.float32, torch.bfloat16)
    maps.student[0] = MAP_LAYOUTS["channels_last"](maps.student[0])

    def function(*tensors: Any) -> Any:
        return camkd_feature_loss_and_grad(*tensors, backend=backend, **OPTIONS[what])

    out, grads = torch.compile(function, backend="aot_eager", fullgraph=True)(*maps)
    eager, eager_grads = function(*maps)
    for ours, theirs in zip((out.loss, out.weights, *grads), (eager.loss, eager.weights, *eager_grads), strict=True):
        assert ours.stride() == theirs.stride()
        assert_near(ours, theirs)


# --- backward of the autograd form, whose gradient the forward pass has stored ---------------------------------------


def leaves_and_loss(backend: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor, Tensor]:
    maps = make(dtype)
    leaves = [r.clone().requires_grad_() for r in maps.student]
    weights = torch.rand(3, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    return leaves, weights, weighted_feature_loss(leaves, maps.teachers, weights, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_backward_twice_through_a_retained_graph(dtype: torch.dtype, backend: str) -> None:
    leaves, weights, loss = leaves_and_loss(backend, dtype)
    first = torch.autograd.grad(loss, [*leaves, weights], retain_graph=True)
    scaled = torch.autograd.grad(loss * 4, [*leaves, weights], retain_graph=True)
    again = torch.autograd.grad(loss, [*leaves, weights])
    for a, b, c in zip(first, scaled, again, strict=True):
        assert torch.equal(a, c)
        assert_near(b, 4 * a)


def test_the_gradient_of_some_inputs_only(backend: str) -> None:
    leaves, weights, loss = leaves_and_loss(backend)
    every = torch.autograd.grad(loss, [*leaves, weights], retain_graph=True)
    assert torch.equal(torch.autograd.grad(loss, weights, retain_graph=True)[0], every[3])
    assert torch.equal(torch.autograd.grad(loss, leaves[1])[0], every[1])
    maps = make()
    frozen = weighted_feature_loss(maps.student, maps.teachers, weights, backend=backend)
    assert_near(torch.autograd.grad(frozen, weights)[0], every[3])


def test_gradients_accumulate_in_leaves(backend: str) -> None:
    leaves, _, loss = leaves_and_loss(backend)
    loss.backward()
    once = [leaf.grad.clone() for leaf in leaves]
    maps = make()
    weights = torch.rand(3, 6, generator=torch.Generator().manual_seed(0))
    weighted_feature_loss(leaves, maps.teachers, weights, backend=backend).backward()
    for leaf, grad in zip(leaves, once, strict=True):
        assert torch.equal(leaf.grad, 2 * grad)


def test_float16_under_a_grad_scaler(backend: str) -> None:
    """Gradients that float16 could not hold without the scale: they would be subnormal."""
    maps = make(torch.float16, shapes=[(8, 64, 32, 32), (8, 16, 32, 32)], ignored=())
    weights, _ = confidence_weights(maps.logits, maps.target, backend=backend)
    leaves = [r.clone().requires_grad_() for r in maps.student]
    loss = weighted_feature_loss(leaves, maps.teachers, weights, backend=backend)
    (65536.0 * loss).backward()
    R, N = (expected(maps, dtype, loss_scale=65536.0)[2:] for dtype in (torch.float64, torch.float32))
    for leaf, true, eager in zip(leaves, R, N, strict=True):
        assert rms(true) / 65536.0 < torch.finfo(torch.float16).tiny / 4
        assert_accurate(leaf.grad, true, eager)


def test_a_batch_of_incoming_gradients(backend: str) -> None:
    if backend == "triton":
        pytest.skip("a named backend does not take the batched tensors of torch.vmap")
    leaves, _, loss = leaves_and_loss("auto")
    grads = torch.autograd.grad(loss, leaves, torch.tensor([1.0, -2.0]), is_grads_batched=True, retain_graph=True)
    for batch, one in zip(grads, torch.autograd.grad(loss, leaves), strict=True):
        assert_near(batch, torch.stack([one, -2 * one]))
