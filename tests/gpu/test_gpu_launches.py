"""How often the host launches work on a GPU: in a call of the loss, and around a replayed step.

At small batches these calls cost more than the kernels, so more of them than today need a reason.
"""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch

from benchmarks import profiler
from camkd_fast import (
    camkd_feature_loss_and_grad,
    camkd_loss,
    camkd_loss_and_grad,
    confidence_weights,
    weighted_feature_loss,
)
from camkd_fast.data.batch import Batch
from camkd_fast.losses.output import CAMKDOutput
from camkd_fast.train.config import PrecisionConfig
from camkd_fast.train.step_graph import WARM_UP
from tests.gpu.test_gpu_training import on_device, step_on
from tests.support.cases import make_case, on
from tests.support.feature_cases import Maps, make
from tests.support.gpu import CUDA, NO_GPU, REAL, Place
from tests.support.training import batch

# Deterministic algorithms, which the suite uses, fill new memory by launches of their own.
pytestmark = [
    pytest.mark.usefixtures("nondeterministic"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU),
]


@pytest.mark.parametrize("place", REAL[:2])
@pytest.mark.parametrize("num_items", [None, 64])
@pytest.mark.parametrize(("N", "C"), [(64, 100), (1024, 1000), (64, 32000)])
def test_a_call_of_the_loss(place: Place, N: int, C: int, num_items: int | None) -> None:
    """Value and gradient: the rows, and what they need for the mean; or the rows, a sum and its scaling."""
    case = on(make_case(N, C, 3, torch.bfloat16, padded=False), place.device)

    def call() -> None:
        camkd_loss_and_grad(case.student, case.teachers, case.target, num_items=num_items, backend=place.backend)

    call()
    found = profiler.profiled(call, place.device)
    assert 1 <= found.launches <= 3 and found.kernels <= 3, found


@pytest.mark.parametrize(("N", "C"), [(64, 100), (1024, 1000), (64, 32000)])
def test_a_mean_of_another_formula_by_cuda(N: int, C: int) -> None:
    """One launch, like the paper's formula."""
    case = on(make_case(N, C, 3, torch.bfloat16, ignored=0.2, padded=False, divergence=("jsd", 0.5)), CUDA)

    def call() -> None:
        camkd_loss_and_grad(case.student, case.teachers, case.target, backend="cuda", **case.options())

    call()
    found = profiler.profiled(call, CUDA)
    assert found.kernels == found.launches == 1, found


@pytest.mark.parametrize("num_items", [None, 64])
@pytest.mark.parametrize(("N", "C", "counted"), [(64, 100, 0), (1024, 1000, 0), (64, 32000, 0), (4096, 1000, 1)])
def test_a_mean_by_triton(N: int, C: int, counted: int, num_items: int | None) -> None:
    """One launch, or one more that counts the valid rows of a large batch; repeated, as counters are used again."""
    case = on(make_case(N, C, 3, torch.bfloat16, ignored=0.2, padded=False), CUDA)

    def call() -> tuple[CAMKDOutput, torch.Tensor]:
        return camkd_loss_and_grad(case.student, case.teachers, case.target, num_items=num_items, backend="triton")

    first, first_grad = call()
    for _ in range(20):
        out, grad = call()
        assert torch.equal(grad, first_grad)
        assert [float(x) for x in (out.loss, out.hard, out.soft)] == [
            float(x) for x in (first.loss, first.hard, first.soft)
        ]
    found = profiler.profiled(call, CUDA)
    expected = 1 if num_items else 1 + counted
    assert 1 <= found.kernels <= expected and found.launches <= expected, found


def test_triton_launches_the_first_call_of_a_kind_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later ones launch the kept kernels: bit for bit the same results, on other streams and in a graph too."""
    jit = importlib.import_module("triton.runtime.jit")
    by_triton: list[str] = []
    run = jit.JITFunction.run
    monkeypatch.setattr(
        jit.JITFunction, "run", lambda self, *a, **k: by_triton.append(self.__name__) or run(self, *a, **k)
    )
    case = on(make_case(64, 100, 3, torch.bfloat16, padded=False), CUDA)

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        out, grad = camkd_loss_and_grad(case.student, case.teachers, case.target, backend="triton")
        return out.loss, grad

    first = call()
    by_triton.clear()
    results, stream, graph = [call()], torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results.append(call())
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        recorded = call()
    for _ in range(2):
        for tensor in recorded:
            tensor.zero_()
        graph.replay()
        results.append(tuple(tensor.clone() for tensor in recorded))
    assert not by_triton
    assert all(torch.equal(x, y) for result in results for x, y in zip(result, first, strict=True))


@pytest.mark.parametrize("place", REAL[:2])
def test_loss_and_backward(place: Place) -> None:
    """The call, the gradient 1 of the loss, and one launch that finds that it is 1."""
    case = on(make_case(64, 100, 3, torch.bfloat16, padded=False), place.device)
    student = case.student.detach().requires_grad_()

    def call() -> None:
        student.grad = None
        camkd_loss(student, case.teachers, case.target, backend=place.backend).loss.backward()

    call()
    found = profiler.profiled(call, place.device)
    assert 1 <= found.launches <= 5 and found.kernels <= 5, found


def feature_maps() -> Maps:
    return make(torch.float32, torch.float32, [(64, 64, 8, 8), (64, 256, 8, 8)]).to(CUDA)


@pytest.mark.parametrize("place", REAL[:1])
def test_the_feature_loss_and_its_gradient(place: Place) -> None:
    """The weights, the maps, and a sum where the last block of the maps cannot add up."""
    maps = feature_maps()

    def call() -> None:
        camkd_feature_loss_and_grad(*maps, backend=place.backend)

    call()
    found = profiler.profiled(call, place.device)
    assert 1 <= found.launches <= 3 and found.kernels <= 3, found


@pytest.mark.parametrize("place", REAL[:1])
def test_the_autograd_form_of_the_feature_loss(place: Place) -> None:
    """The same, the gradient 1 of the loss, its product with both stored gradients, and that of the logits."""
    maps = feature_maps()
    leaves = [x.requires_grad_() for x in (*maps.student, *maps.logits)]

    def call() -> None:
        for leaf in leaves:
            leaf.grad = None
        weights, _ = confidence_weights(maps.logits, maps.target, backend=place.backend)
        weighted_feature_loss(maps.student, maps.teachers, weights, backend=place.backend).backward()

    call()
    found = profiler.profiled(call, place.device)
    assert 1 <= found.launches <= 7 and found.kernels <= 7, found


@pytest.mark.parametrize("ahead", ["on", "off"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("where", ["host", "device", "images on the device"])
def test_a_replayed_step(where: str, dropout: float, ahead: str) -> None:
    """The record, each input that was on the device, the graph, and the seed and offset of its random numbers."""
    step = step_on(CUDA, PrecisionConfig(compile="off", teacher_ahead=ahead), dropout=dropout)  # type: ignore[arg-type]
    pair = [placed(batch(32, seed=i), where) for i in range(2)]
    numbers = itertools.count()

    def call() -> None:
        i = next(numbers)
        step(pair[i % 2], 32, 0.01, i, pair[(i + 1) % 2] if step.looks_ahead else None)

    for _ in range(WARM_UP + 2):
        call()
    found = profiler.profiled(call, CUDA)
    copies = 1 + {"host": 0, "device": 2, "images on the device": 1}[where]
    assert copies + 1 <= found.launches <= copies + 3 < found.kernels, found


def placed(given: Batch, where: str) -> Batch:
    moved = on_device(given, CUDA)
    return {"host": given, "device": moved, "images on the device": given._replace(images=moved.images)}[where]
