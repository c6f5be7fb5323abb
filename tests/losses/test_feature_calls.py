"""The feature loss and its weights in one C++ call each: which inputs they accept and decline, and that no result
changes by a bit.
"""

from __future__ import annotations

import gc
import math
import sys
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from camkd_fast import camkd_feature_loss_and_grad, confidence_weights, weighted_feature_loss
from camkd_fast.losses.feature import scaled_feature_loss
from tests.support.backends import BACKENDS
from tests.support.cases import make_case
from tests.support.feature_cases import Maps, make
from tests.support.op_contract import LAYOUT_PAIRS, MAP_LAYOUTS
from tests.support.tensors import Wrapped, strided
from tests.support.torch_version import HAS_C_FUNCTIONS, OLD_TORCH

if "cpu" not in BACKENDS:
    pytest.skip("a build without the compiled module", allow_module_level=True)
if not HAS_C_FUNCTIONS:
    pytest.skip(OLD_TORCH, allow_module_level=True)

from camkd_fast.backends import cpu as cpu_backend
from camkd_fast.backends.dispatch import whole_losses
from camkd_fast.backends.feature_maps import gradient_strides, map_pair

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def with_gaps(x: Tensor) -> Tensor:
    """In every dimension, so that no two strides describe a sample."""
    return nn.functional.pad(x, (0, 1, 0, 1, 0, 1))[:, : x.shape[1], : x.shape[2], : x.shape[3]]


def needs_no_copy(first: str, second: str) -> bool:
    r = torch.zeros(6, 9, 5, 3)
    given = MAP_LAYOUTS[first](r), MAP_LAYOUTS[second](r)
    return all(a is b for a, b in zip(map_pair(*given)[:2], given, strict=True))


IN_PLACE = [pair for pair in LAYOUT_PAIRS if needs_no_copy(*pair)]


def weights_in_one_call(logits: Any, target: Any, ignore_index: Any = -100, second: Any = None) -> Any:
    return cpu_backend.whole_losses.confidence_weights(logits, target, ignore_index, second)


def loss_in_one_call(student: Any, teachers: Any, weights: Any, reduction: Any = "mean", scale: Any = None) -> Any:
    return cpu_backend.whole_losses.whole_feature_loss(student, teachers, weights, reduction, scale)


def one_pass(
    student: Any,
    teachers: Any,
    logits: Any,
    target: Any,
    beta: Any = 1.0,
    reduction: Any = "mean",
    num_items: Any = None,
    ignore_index: Any = -100,
    loss_scale: Any = 1.0,
    second: Any = None,
) -> Any:
    return cpu_backend.whole_losses.feature_loss_and_grad(
        student, teachers, logits, target, beta, reduction, num_items, ignore_index, loss_scale, second
    )


def both_ways(general: Any, function: Any) -> list[list[Tensor]]:
    """The tensors that `function` returns, by the C++ calls and by the general path."""
    results = []
    for yes in (False, True):
        general(yes)
        results.append(function())
    general(False)
    return results


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    for ours, expected in zip(one, other, strict=True):
        assert ours.dtype == expected.dtype and ours.shape == expected.shape and ours.stride() == expected.stride()
        assert torch.equal(ours, expected)


# --- no result changes by a bit --------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(37,), (4, 9)], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("which", ["both", "weights", "ce"])
@pytest.mark.parametrize(("C", "K", "two_labels"), [(10, 1, False), (100, 3, False), (100, 3, True), (5000, 2, True)])
def test_confidence_weights(C, K, two_labels, which, dtype, lead, general):
    case = make_case(math.prod(lead), C, K, dtype, lead=lead, ignored=0.3, two_labels=two_labels)
    second = {"second_target": case.second_target, "mix": case.mix}
    cotangents = [torch.randn(K, *lead) for _ in range(2)]
    # A zero gradient of the cross-entropies is left out of the sum, which may change its last bit.
    logits = [z.detach().requires_grad_() for z in case.teachers]
    assert weights_in_one_call(logits, case.target, second=tuple(second.values()) if two_labels else None) is not None

    def run() -> list[Tensor]:
        results = confidence_weights(logits, case.target, **second)
        used = {"both": results, "weights": results[:1], "ce": results[1:]}[which]
        own = cotangents[1:] if which == "ce" else cotangents[: len(used)]
        return [*(x.detach() for x in results), *torch.autograd.grad(used, logits, own)]

    (weights, ce, *grads), (other_weights, other_ce, *others) = both_ways(general, run)
    assert_same([weights, ce], [other_weights, other_ce])
    for ours, expected in zip(grads, others, strict=True):
        # The general path chains the weights' gradient in PyTorch operations, which add in another order.
        assert ours.dtype == expected.dtype and ours.is_contiguous()
        largest = float(expected.abs().max())
        assert float((ours.float() - expected.float()).abs().max()) <= 4 * torch.finfo(dtype).eps * largest


@pytest.mark.parametrize(("first", "second"), IN_PLACE)
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32), (F16, BF16)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum", "loss_scale": 8.0},
        {"num_items": 9, "beta": 50.0},
        {"num_items": 7.5, "loss_scale": torch.tensor([4.0])},
        {"loss_scale": torch.tensor(4.0), "ignore_index": 7},
        {"second": (torch.tensor([3, 1, 4, 1, 5, 9]), torch.linspace(0, 1, 6))},
    ],
    ids=str,
)
def test_value_and_gradient(options, dtypes, first, second, general):
    maps = make(*dtypes, ignored=())
    maps.target[2] = options.get("ignore_index", -100)
    student, teachers = [MAP_LAYOUTS[first](r) for r in maps.student], [MAP_LAYOUTS[second](f) for f in maps.teachers]
    assert one_pass(student, teachers, maps.logits, maps.target, **options) is not None

    keywords = {name: value for name, value in options.items() if name != "second"}
    if "second" in options:
        keywords |= dict(zip(("second_target", "mix"), options["second"], strict=True))

    def run() -> list[Tensor]:
        out, grads = camkd_feature_loss_and_grad(student, teachers, maps.logits, maps.target, **keywords)
        return [out.loss, out.weights, out.teacher_ce, *grads]

    assert_same(*both_ways(general, run))


@pytest.mark.parametrize(("first", "second"), IN_PLACE)
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F16)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("incoming", [1.0, -2.5])
def test_autograd_form(incoming, reduction, dtypes, first, second, general):
    maps = make(*dtypes)
    student = [MAP_LAYOUTS[first](r).detach().requires_grad_() for r in maps.student]
    teachers = [MAP_LAYOUTS[second](f) for f in maps.teachers]
    weights = torch.rand(6, 3).t().requires_grad_()
    assert loss_in_one_call(student, teachers, weights, reduction) is not None

    def run() -> list[Tensor]:
        loss = weighted_feature_loss(student, teachers, weights, reduction)
        by = torch.tensor(incoming)
        retained = torch.autograd.grad(loss, [*student, weights], by, retain_graph=True)
        return [loss.detach(), *retained, *torch.autograd.grad(loss, [*student, weights], by)]

    ours, expected = both_ways(general, run)
    # A product of three numbers, in another order.
    assert torch.equal(ours.pop(-1), ours[4]) and torch.equal(expected.pop(-1), expected[4])
    assert float((ours.pop(4) / expected.pop(4) - 1).abs().max()) <= 3 * torch.finfo(F32).eps
    assert_same(ours, expected)


@pytest.mark.parametrize("retained", [False, True])
@pytest.mark.parametrize("scale", [0.25, torch.tensor([0.25])], ids=["number", "element"])
def test_a_scale_of_the_mean(scale, retained, general):
    """As CAMKDFeatureLoss passes the divisor, which is on the device of the labels."""
    student = [r.clone().requires_grad_() for r in R]
    weights = W.clone().requires_grad_()
    assert loss_in_one_call(student, F, weights, scale=scale) is not None

    def run() -> list[Tensor]:
        loss = scaled_feature_loss(student, F, weights, "mean", scale, "auto")
        by = torch.tensor(3.0)
        return [loss.detach(), *torch.autograd.grad(loss, [*student, weights], by, retain_graph=retained)]

    assert_same(*both_ways(general, run))


@st.composite
def views(draw: st.DrawFn) -> Tensor:
    """A map of 2 to 5 dimensions with sizes of 1, gaps and dimensions in any order."""
    order = draw(st.permutations(range(draw(st.integers(1, 4)))))
    shape = [draw(st.integers(1, 3)) for _ in order]
    gaps = [draw(st.booleans()) for _ in order]
    maps = torch.randn(2, *[size + gap for size, gap in zip(shape, gaps, strict=True)])
    for d, size in enumerate(shape, 1):
        maps = maps.narrow(d, 0, size)
    return maps.permute(0, *[1 + d for d in order])


@settings(max_examples=300)
@given(student=views(), order=st.randoms(use_true_random=False), same=st.booleans())
def test_every_layout_that_needs_no_copy_is_accepted(student: Tensor, order: Any, same: bool) -> None:
    dimensions = list(range(1, student.dim()))
    order.shuffle(dimensions)
    inverse = [0, *(1 + dimensions.index(d) for d in range(1, student.dim()))]
    teacher = student if same else student.permute(0, *dimensions).contiguous().permute(inverse)
    pair = map_pair(student, teacher)
    in_place = pair.student is student and pair.teacher is teacher
    found = one_pass([student], [teacher], [torch.randn(2, 3)], torch.tensor([0, 2]))
    assert (found is not None) == in_place
    if found is not None:
        assert found[3][0].stride() == gradient_strides(student) and not found[3][0].any()


# --- what is declined ------------------------------------------------------------------------------------------------

R, F, Z, Y = make()
W = torch.rand(3, 6)
WIDE = torch.randn(6, 4, 2, 2, 2, 2, 2)
MAPS_DECLINED: dict[str, tuple[Any, Any]] = {
    "no maps": ([], []),
    "17 teachers": (R[:1] * 17, F[:1] * 17),
    "one teacher less": (R, F[:2]),
    "one tensor": (torch.stack(R[:1]), torch.stack(F[:1])),
    "an iterator": (iter(R), F),
    "no tensor": ([R[0], None, R[2]], F),
    "no tensor of a teacher": (R, [F[0], 1.0, F[2]]),
    "another dtype": ([R[0], R[1].bfloat16(), R[2]], F),
    "float64": ([r.double() for r in R], F),
    "float64 teacher": (R, [f.double() for f in F]),
    "integers": ([r.long() for r in R], F),
    "another shape": (R, [F[0], F[2], F[1]]),
    "other samples": ([R[0], R[1][:5], R[2]], [F[0], F[1][:5], F[2]]),
    "samples only": ([torch.randn(6)] * 3, [torch.randn(6)] * 3),
    "seven dimensions": ([WIDE] * 3, [WIDE] * 3),
    "no samples": ([r[:0] for r in R], [f[:0] for f in F]),
    "no values": ([r[:, :0] for r in R], [f[:, :0] for f in F]),
    "teacher that requires grad": (R, [F[0], F[1].clone().requires_grad_(), F[2]]),
    "on meta": ([r.to("meta") for r in R], [f.to("meta") for f in F]),
    "teacher on meta": (R, [F[0].to("meta"), *F[1:]]),
    "subclass": ([R[0].as_subclass(Wrapped), *R[1:]], F),
    "subclass of a teacher": (R, [F[0].as_subclass(Wrapped), *F[1:]]),
    "three strides": ([with_gaps(r) for r in R], F),
    "negated": ([torch.imag(torch.randn(6, 2, dtype=torch.complex64).conj())], [torch.randn(6, 2)]),
}


@pytest.mark.parametrize("name", MAPS_DECLINED)
def test_maps_that_are_declined(name):
    student, teachers = MAPS_DECLINED[name]
    K = len(student) if isinstance(student, list) else 3
    N = student[0].shape[0] if isinstance(student, list) and student else 6
    assert loss_in_one_call(student, teachers, torch.rand(K, N)) is None
    assert one_pass(student, teachers, [torch.randn(N, 10)] * K, torch.zeros(N, dtype=torch.long)) is None


LOGITS_DECLINED: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "no logits": ([], Y, {}),
    "None": (None, Y, {}),
    "17 teachers": (Z[:1] * 17, Y, {}),
    "one tensor": (torch.stack(Z), Y, {}),
    "no tensor": ([Z[0], None, Z[2]], Y, {}),
    "one dimension": ([z[0] for z in Z], Y[0], {}),
    "no rows": ([z[:0] for z in Z], Y[:0], {}),
    "no classes": ([z[:, :0] for z in Z], Y, {}),
    "other classes": ([Z[0], Z[1][:, :9], Z[2]], Y, {}),
    "other rows": ([Z[0], Z[1][:5], Z[2]], Y, {}),
    "float64": ([z.double() for z in Z], Y, {}),
    "strided columns": ([strided(z) for z in Z], Y, {}),
    "on meta": ([z.to("meta") for z in Z], Y.to("meta"), {}),
    "one on meta": ([Z[0], Z[1].to("meta"), Z[2]], Y, {}),
    "subclass": ([Z[0].as_subclass(Wrapped), *Z[1:]], Y, {}),
    "int32 labels": (Z, Y.int(), {}),
    "strided labels": (Z, torch.stack([Y, Y], 1)[:, 0], {}),
    "fewer labels": (Z, Y[:5], {}),
    "label too large": (Z, Y.clone().fill_(10), {}),
    "label below 0": (Z, Y.clone().fill_(-1), {}),
    "second label too large": (Z, Y, {"second": (Y.clone().fill_(10), torch.rand(6))}),
    "share above 1": (Z, Y, {"second": (Y, torch.full((6,), 1.5))}),
    "fewer shares": (Z, Y, {"second": (Y, torch.rand(5))}),
    "ignore_index a string": (Z, Y, {"ignore_index": "none"}),
    "ignore_index true": (Z, Y, {"ignore_index": True}),
    "ignore_index beyond int64": (Z, Y, {"ignore_index": 2**64}),
}


@pytest.mark.parametrize("name", LOGITS_DECLINED)
def test_logits_that_are_declined(name):
    logits, target, options = LOGITS_DECLINED[name]
    assert weights_in_one_call(logits, target, **options) is None
    assert one_pass(R, F, logits, target, **options) is None


ONE_PASS_DECLINED: dict[str, dict[str, Any]] = {
    "single samples": {"reduction": "none"},
    "unknown reduction": {"reduction": "average"},
    "no reduction": {"reduction": None},
    "beta a string": {"beta": "1"},
    "beta a tensor": {"beta": torch.tensor(2.0)},
    "beta nan": {"beta": math.nan},
    "items 0": {"num_items": 0},
    "items of a sum": {"reduction": "sum", "num_items": 4},
    "items a tensor": {"num_items": torch.tensor(4.0)},
    "loss scale inf": {"loss_scale": math.inf},
    "loss scale of two elements": {"loss_scale": torch.ones(2)},
    "loss scale a float64 tensor": {"loss_scale": torch.ones(1, dtype=torch.float64)},
    "loss scale None": {"loss_scale": None},
    "fewer sets of logits": {"logits": Z[:2]},
    "logits of other samples": {"logits": [z[:5] for z in Z], "target": Y[:5]},
    "logits of sequences": {"logits": [z.view(2, 3, 10) for z in Z], "target": Y.view(2, 3)},
}


@pytest.mark.parametrize("name", ONE_PASS_DECLINED)
def test_one_pass_declines(name):
    tensors = {"student": R, "teachers": F, "logits": Z, "target": Y}
    assert one_pass(**tensors) is not None
    assert one_pass(**{**tensors, **ONE_PASS_DECLINED[name]}) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": W.double()},
        {"weights": W[:2]},
        {"weights": W[:, :5]},
        {"weights": W[0]},
        {"weights": W.tolist()},
        {"weights": W.to("meta")},
        {"reduction": "none"},
        {"reduction": "average"},
        {"scale": torch.ones(2)},
        {"scale": math.nan},
        {"student": [r.half().requires_grad_() for r in R]},
        {"student": [r.half() for r in R], "weights": W.clone().requires_grad_()},
    ],
    ids=[
        *("float64 weights", "fewer weights", "weights of fewer samples", "weights of samples", "a list"),
        *("weights on meta", "single samples", "unknown reduction", "two scales", "scale nan"),
        *("float16 whose gradient is to be stored", "float16 with weights that learn"),
    ],
)
def test_the_autograd_form_declines(changes):
    arguments = {"student": R, "teachers": F, "weights": W}
    assert loss_in_one_call(**arguments) is not None
    assert loss_in_one_call(**{**arguments, **changes}) is None


def test_gradients_that_are_declined():
    logits = [z.clone().requires_grad_() for z in Z]
    _, _, kept = weights_in_one_call(logits, Y)
    g = torch.randn(3, 6)
    assert cpu_backend.whole_losses.confidence_gradients(logits, Y, -100, kept, g, None) is not None
    for of_weights, of_ce, other in (
        (g.t().contiguous().t(), None, kept),
        (g[:1].expand(3, 6), None, kept),
        (g.double(), None, kept),
        (None, g[:, :5].contiguous(), kept),
        (g, g[:2], kept),
        (g, None, kept[:1]),
        (g, None, kept.double()),
    ):
        assert cpu_backend.whole_losses.confidence_gradients(logits, Y, -100, other, of_weights, of_ce) is None
    found = loss_in_one_call([r.clone().requires_grad_() for r in R], F, W.clone().requires_grad_())
    arguments = {"buffer": found.buffer, "error": found.error, "scale": found.scale, "retained": True}
    one = torch.ones(())
    assert cpu_backend.whole_losses.feature_gradients(grad_output=one, **arguments) is not None
    for changes in (
        {"grad_output": torch.ones(1)},
        {"grad_output": one.double()},
        {"grad_output": one.to("meta")},
        {"scale": torch.ones(2)},
        {"scale": torch.ones(1).double()},
        {"buffer": found.buffer.double()},
        {"buffer": found.buffer[0]},
        {"error": found.error.t()},
        {"error": found.error.to("meta")},
    ):
        assert cpu_backend.whole_losses.feature_gradients(**{"grad_output": one, **arguments, **changes}) is None


def test_tensors_without_memory_of_their_own_are_declined():
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(r) for r in R]
        assert loss_in_one_call(fake, F, W) is None and one_pass(fake, F, Z, Y) is None
        assert weights_in_one_call([mode.from_tensor(z) for z in Z], Y) is None
    seen = []

    def loss(r: Tensor) -> Tensor:
        seen.append((loss_in_one_call([r], F[:1], W[:1]), one_pass([r], F[:1], Z[:1], Y)))
        return r.sum()

    torch.func.grad(loss)(R[0])
    torch.func.vmap(loss)(torch.stack([R[0], R[0]]))
    assert seen == [(None, None)] * 2


# --- memory ----------------------------------------------------------------------------------------------------------


def test_gradients_are_computed_only_if_needed():
    maps, own = [r.clone().requires_grad_() for r in R], W.clone().requires_grad_()
    for student, weights, needs in ((R, W, (0, 0)), (maps, W, (1, 0)), (R, own, (0, 1)), (maps, own, (1, 1))):
        found = loss_in_one_call(student, F, weights)
        assert (found.buffer is not None, found.error is not None) == needs
        with torch.no_grad():
            found = loss_in_one_call(student, F, weights)
            assert found.buffer is None and found.error is None
    assert weights_in_one_call(Z, Y)[2] is None
    some = [Z[0], Z[1].clone().requires_grad_(), Z[2]]
    assert weights_in_one_call(some, Y)[2].shape == (2, 3, 6)
    with torch.no_grad():
        assert weights_in_one_call(some, Y)[2] is None


def test_weights_may_be_changed_before_backward():
    logits = [z.clone().requires_grad_() for z in Z]
    expected = torch.autograd.grad(confidence_weights(logits, Y)[0].square().sum(), logits)
    weights, ce = confidence_weights(logits, Y)
    total = weights.square().sum()
    with torch.no_grad():
        ce.zero_()
    grads = torch.autograd.grad(total, logits)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
    weights, _ = confidence_weights(logits, Y)
    with torch.no_grad():
        before = weights.clone()
        weights.zero_()
    grads = torch.autograd.grad(weights, logits, 2 * before)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_results_outlive_inputs_and_later_calls():
    """Small tensors, and some in recycled memory, which is released by its last owner."""
    for shapes in ([(3, 4, 2, 2)] * 2, [(8, 64, 32, 32), (8, 16, 5, 5)]):
        maps = make(shapes=shapes, ignored=())
        leaves = [r.clone().requires_grad_() for r in maps.student]
        out, grads = camkd_feature_loss_and_grad(*maps)
        weighted_feature_loss(leaves, maps.teachers, out.weights).backward()
        parts = [*out, *grads, *(leaf.grad for leaf in leaves)]
        kept = [part.clone() for part in parts]
        del maps, out, grads, leaves
        gc.collect()
        others = [camkd_feature_loss_and_grad(*make(shapes=shapes, ignored=(0,))) for _ in range(5)]
        assert all(torch.equal(part, copy) for part, copy in zip(parts, kept, strict=True))
        del others


def test_reference_counts_are_restored():
    student, logits = [nn.Parameter(r) for r in R], [z.clone().requires_grad_() for z in Z]
    objects = [*student, *F, *logits, Y, W, student, F]
    before = [sys.getrefcount(x) for x in objects]
    for _ in range(50):
        weights, ce = confidence_weights(logits, Y)
        (weighted_feature_loss(student, F, weights) + ce.sum()).backward()
        weights_in_one_call(logits, Y.int())
        one_pass(student, F, logits, Y)
        one_pass(student, F, logits, Y, beta="1")
        loss_in_one_call(student, F, W, scale=math.nan)
    del weights, ce
    assert [sys.getrefcount(x) for x in objects] == before


def test_a_torch_without_c_functions(general):
    """As before torch 2.10: the general path is taken."""
    general(True)
    maps = make()
    assert whole_losses("auto", Z[0]) is whole_losses("auto", R[0], maps=True) is None
    check_all(maps)


def check_all(maps: Maps) -> None:
    leaves = [r.clone().requires_grad_() for r in (*maps.student, *maps.logits)]
    weights, _ = confidence_weights(leaves[3:], maps.target)
    weighted_feature_loss(leaves[:3], maps.teachers, weights).backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
