"""The feature loss of the CUDA kernels in one crossing each, executed on the host (test_row_loss_on_host.py).

The crossings read and make tensors by torch's C functions; the emulated device has the host's memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from camkd_fast import camkd_feature_loss_and_grad, confidence_weights, weighted_feature_loss
from tests.losses.test_feature_calls import IN_PLACE, LOGITS_DECLINED, MAPS_DECLINED, ONE_PASS_DECLINED
from tests.losses.test_feature_loss import eager_feature_loss, eager_weights
from tests.support.cases import make_case
from tests.support.feature_cases import Maps, check, make
from tests.support.op_contract import MAP_LAYOUTS
from tests.support.tolerance import assert_accurate, assert_near, rms

pytest.importorskip("camkd_fast._C")
pytest.importorskip("pybind11")
from camkd_fast.backends import cuda as cuda_backend
from tests.cuda.host.on_host import cuda_on_the_host, emulated, in_one_call, labels_counted_by_backend, limit

__all__ = ["cuda_on_the_host", "emulated"]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SIZES = {"small": [(6, 9, 5, 3), (6, 4, 1, 1), (6, 16, 4, 4)], "large": [(2, 40, 9, 9), (2, 3, 1, 1)]}


@pytest.fixture(autouse=True)
def crossing(emulated: ModuleType, cuda_on_the_host: None) -> Iterator[None]:
    with in_one_call(emulated), labels_counted_by_backend():
        yield


def one_pass(maps: Maps, **options: Any) -> Any:
    given = {"beta": 1.0, "reduction": "mean", "num_items": None, "ignore_index": -100, "loss_scale": 1.0} | options
    return cuda_backend.whole_losses.feature_loss_and_grad(*maps, *given.values())


# --- value and gradient ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separate", [False, True], ids=["last block", "second launch"])
@pytest.mark.parametrize("multiprocessors", [2, 64], ids=["whole samples", "parts"])
@pytest.mark.parametrize("size", SIZES)
def test_one_pass(emulated: ModuleType, size: str, multiprocessors: int, separate: bool) -> None:
    limit(emulated, multiprocessors=multiprocessors)
    emulated.set_grid(False, separate)
    maps = make(F32, BF16, SIZES[size], ignored=(1,))
    assert one_pass(maps) is not None
    check(maps, "cuda")
    emulated.set_grid(False, False)


@pytest.mark.parametrize("ignored", [(), (2,), (0, 1, 2, 3, 4, 5)], ids=["all kept", "one ignored", "all ignored"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum", "beta": 3},
        {"num_items": 9, "loss_scale": torch.tensor(64.0)},
        {"loss_scale": torch.tensor([[64.0]]), "beta": 50.0},
        {"loss_scale": 64.0},
    ],
    ids=str,
)
def test_options(options: dict[str, Any], dtype: torch.dtype, ignored: tuple[int, ...]) -> None:
    maps = make(dtype, ignored=ignored)
    assert one_pass(maps, **options) is not None
    check(maps, "cuda", **options)


@pytest.mark.parametrize(("first", "second"), IN_PLACE)
def test_layouts(first: str, second: str) -> None:
    maps = make(F32, BF16)
    maps = maps._replace(
        student=[MAP_LAYOUTS[first](r) for r in maps.student], teachers=[MAP_LAYOUTS[second](f) for f in maps.teachers]
    )
    assert one_pass(maps) is not None
    check(maps, "cuda")


def test_bitwise_the_general_path(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = make(BF16, F32)
    results = []
    for connected in (True, False):
        monkeypatch.setattr(cuda_backend.whole_losses, "connected", connected)
        for options in ({"loss_scale": 8.0}, {"reduction": "sum"}, {"num_items": 3, "beta": 2.0}):
            out, grads = camkd_feature_loss_and_grad(*maps, backend="cuda", **options)
            results.append([*out, *grads])
    for ours, expected in zip(results[:3], results[3:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


# --- the autograd form -----------------------------------------------------------------------------------------------


def eager(student: list[Tensor], teachers: list[Tensor], logits: list[Tensor], target: Tensor) -> Tensor:
    weights, ce = eager_weights(logits, target)
    return eager_feature_loss(student, teachers, weights, "mean") + (ce * ce).sum()


def ours(student: list[Tensor], teachers: list[Tensor], logits: list[Tensor], target: Tensor) -> Tensor:
    weights, ce = confidence_weights(logits, target, backend="cuda")
    return weighted_feature_loss(student, teachers, weights, backend="cuda") + (ce * ce).sum()


def gradients(maps: Maps, dtype: torch.dtype | None, loss: Any, factor: float) -> list[Tensor]:
    """The loss and the gradients of maps and logits, in `dtype` or in those of the tensors."""
    tensors = [x.to(dtype or x.dtype) for x in (*maps.student, *maps.teachers, *maps.logits)]
    K = len(maps.student)
    leaves = [x.detach().requires_grad_() for x in (*tensors[:K], *tensors[2 * K :])]
    value = factor * loss(leaves[:K], tensors[K : 2 * K], leaves[K:], maps.target)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("factor", [1.0, -3.0])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_gradients_of_maps_and_logits(dtype: torch.dtype, size: str, factor: float) -> None:
    maps = make(dtype, dtype, SIZES[size], ignored=(1,))
    found = gradients(maps, None, ours, factor)
    R, N = (gradients(maps, d, eager, factor) for d in (torch.float64, F32))
    for actual, true, narrow in zip(found, R, N, strict=True):
        assert_accurate(actual, true, narrow, floor=1e-6 * rms(true))


@pytest.mark.parametrize("K", [1, 2, 5])
@pytest.mark.parametrize("lead", [(9,), (2, 5)], ids=str)
@pytest.mark.parametrize("which", ["weights", "ce"])
def test_gradients_of_the_logits(which: str, lead: tuple[int, ...], K: int) -> None:
    case = make_case(int(torch.tensor(lead).prod()), 40, K, ignored=0.3, lead=lead, ignore_index=3)
    cotangent = torch.randn(K, *lead)
    results = []
    for dtype, own in ((F32, True), (torch.float64, False), (F32, False)):
        logits = [z.detach().to(dtype).requires_grad_() for z in case.teachers]
        if own:
            found = confidence_weights(logits, case.target, 3, backend="cuda")
        else:
            found = eager_weights([z.flatten(0, -2) for z in logits], case.target.flatten(), 3)
        output = found[0] if which == "weights" else found[1]
        results.append(torch.autograd.grad(output, logits, cotangent.view(output.shape).to(dtype)))
    for actual, true, narrow in zip(*results, strict=True):
        assert_accurate(actual, true, narrow, floor=4e-6 * rms(true))


def test_a_retained_graph_keeps_its_gradient() -> None:
    maps = make()
    leaves = [r.clone().requires_grad_() for r in maps.student]
    weights = torch.rand(3, 6).requires_grad_()
    loss = weighted_feature_loss(leaves, maps.teachers, weights, backend="cuda")
    first = torch.autograd.grad(loss, [*leaves, weights], torch.tensor(2.0), retain_graph=True)
    for grad in first:
        grad.add_(1.0)
    second = torch.autograd.grad(loss, [*leaves, weights])
    for a, b in zip(first, second, strict=True):
        assert_near(a, 2 * b + 1)


# --- what is declined ------------------------------------------------------------------------------------------------

# The device does not tell the host; the rows are NaN.
ON_HOST = ("label too large", "label below 0", "second label too large", "share above 1")


@pytest.mark.parametrize("name", MAPS_DECLINED)
def test_maps_that_are_declined(name: str) -> None:
    student, teachers = MAPS_DECLINED[name]
    K = len(student) if isinstance(student, list) else 3
    N = student[0].shape[0] if isinstance(student, list) and student else 6
    assert cuda_backend.whole_losses.whole_feature_loss(student, teachers, torch.rand(K, N), "mean", None) is None
    maps = Maps(student, teachers, [torch.randn(N, 10)] * K, torch.zeros(N, dtype=torch.long))
    assert one_pass(maps) is None


@pytest.mark.parametrize("name", [name for name in LOGITS_DECLINED if name not in ON_HOST])
def test_logits_that_are_declined(name: str) -> None:
    logits, target, options = LOGITS_DECLINED[name]
    ignore_index, second = options.get("ignore_index", -100), options.get("second")
    assert cuda_backend.whole_losses.confidence_weights(logits, target, ignore_index, second) is None
    assert one_pass(make()._replace(logits=logits, target=target), **options) is None


@pytest.mark.parametrize("name", ONE_PASS_DECLINED)
def test_one_pass_declines(name: str) -> None:
    changes = dict(ONE_PASS_DECLINED[name])
    maps = make()._replace(**{key: changes.pop(key) for key in ("logits", "target") if key in changes})
    assert one_pass(maps, **changes) is None


@pytest.mark.parametrize("name", ON_HOST)
def test_labels_out_of_range_give_nan(name: str) -> None:
    logits, target, options = LOGITS_DECLINED[name]
    loss, _, ce, _ = one_pass(make()._replace(logits=logits, target=target), **options)
    assert loss.isnan() and ce[:, target != -100].isnan().all()
