"""The feature loss on the GPU: both forms, layouts, dtypes, bits, launches, synchronisation, graphs and memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from camkd_fast import camkd_feature_loss_and_grad, confidence_weights, weighted_feature_loss
from camkd_fast.backends import dispatch
from tests.gpu.test_gpu_runtime import no_synchronisation
from tests.support.feature_cases import Maps, check, make
from tests.support.gpu import Place
from tests.support.op_contract import (
    LAYOUT_PAIRS,
    MAP_LAYOUTS,
    assert_counts_valid_rows,
    assert_feature_layouts,
    assert_feature_loss,
)
from tests.support.tolerance import assert_near

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Few large samples, which several blocks share; many small ones; pooled maps; and widths that are no multiple of 8.
SIZES = {
    "large": [(4, 256, 16, 16), (4, 64, 32, 32)],
    "many": [(300, 64, 4, 4), (300, 32, 8, 8)],
    "pooled": [(64, 256, 1, 1), (64, 640, 1, 1), (64, 512, 1, 1)],
    "odd": [(33, 5, 7, 7), (33, 37, 5, 3)],
    "long": [(3, 2048, 31, 31)],
}
OPTIONS = {
    "mean": {},
    "scaled": {"loss_scale": torch.tensor([64.0]), "beta": 50.0, "num_items": 128},
    "none": {"reduction": "none"},
    "uniform": {"weighting": "uniform"},
}


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F32, BF16), (BF16, F16), (F16, F32)], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_value_and_gradient(place: Place, size: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check(on(place, make(*dtypes, SIZES[size])), place.backend)


@pytest.mark.parametrize("what", OPTIONS)
def test_options(place: Place, what: str) -> None:
    options = {k: v.to(place.device) if isinstance(v, Tensor) else v for k, v in OPTIONS[what].items()}
    check(on(place, make(BF16, BF16, SIZES["many"])), place.backend, **options)
    nobody = on(place, make(BF16, BF16, SIZES["odd"], ignored=tuple(range(33))))
    check(nobody, place.backend, **options)


@pytest.mark.parametrize(("first", "second"), LAYOUT_PAIRS)
def test_layouts(place: Place, first: str, second: str) -> None:
    with torch.device(place.device):
        assert_feature_layouts(dispatch.backend_for(place.backend, [torch.zeros(1)]), first, second)


@pytest.mark.parametrize("first", ["contiguous", "channels_last"])
@pytest.mark.parametrize("second", ["contiguous", "channels_last"])
def test_large_maps_in_either_format(place: Place, first: str, second: str) -> None:
    maps = on(place, make(BF16, F32, SIZES["large"]))
    student, teachers = [MAP_LAYOUTS[first](r) for r in maps.student], [MAP_LAYOUTS[second](f) for f in maps.teachers]
    check(maps._replace(student=student, teachers=teachers), place.backend)


def test_contract(place: Place) -> None:
    with torch.device(place.device):
        module = dispatch.backend_for(place.backend, [torch.zeros(1)])
        student = [torch.randn(3, size) for size in (100_000, 2101, 40)]
        student[0][1] = float("nan")
        assert_feature_loss(module, student, [torch.randn_like(r).to(BF16) for r in student])
        assert_counts_valid_rows(module, 1000)


def on(place: Place, maps: Maps) -> Maps:
    return maps.to(place.device)


def autograd(maps: Maps, backend: str, factor: float = 1.0) -> tuple[Tensor, list[Tensor]]:
    """The loss by the autograd form, and the gradients of student and logits."""
    leaves = [x.detach().requires_grad_() for x in (*maps.student, *maps.logits)]
    weights, _ = confidence_weights(leaves[len(maps.student) :], maps.target, backend=backend)
    loss = weighted_feature_loss(leaves[: len(maps.student)], maps.teachers, weights, backend=backend)
    (factor * loss).backward()
    return loss.detach(), [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("size", SIZES)
def test_the_autograd_form(place: Place, size: str) -> None:
    maps = on(place, make(F32, BF16, SIZES[size]))
    loss, grads = autograd(maps, place.backend, 3.0)
    expected, reference = autograd(maps, "reference", 3.0)
    assert_near(loss, expected, rtol=1e-5)
    for ours, theirs in zip(grads, reference, strict=True):
        assert_near(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("size", ["large", "many"])
def test_repeats_bit_for_bit(place: Place, size: str) -> None:
    maps = on(place, make(BF16, BF16, SIZES[size]))
    first = camkd_feature_loss_and_grad(*maps, backend=place.backend)
    for _ in range(3):
        again = camkd_feature_loss_and_grad(*maps, backend=place.backend)
        assert torch.equal(first[0].loss, again[0].loss)
        assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))


def test_the_host_never_synchronises(place: Place) -> None:
    maps = on(place, make(BF16, BF16, SIZES["many"]))

    def everything() -> None:
        camkd_feature_loss_and_grad(*maps, backend=place.backend)
        camkd_feature_loss_and_grad(*maps, backend=place.backend, loss_scale=scale, num_items=scale)
        autograd(maps, place.backend)

    scale = torch.tensor([8.0], device=place.device)
    everything()  # compilation may synchronise
    with no_synchronisation(place.device):
        everything()


def test_fullgraph_equals_eager(place: Place) -> None:
    torch._dynamo.reset()
    maps = on(place, make(BF16, BF16, SIZES["many"]))
    maps = maps._replace(student=[MAP_LAYOUTS["channels_last"](r) for r in maps.student])

    def function(*tensors: object) -> object:
        return camkd_feature_loss_and_grad(*tensors, beta=2.0, num_items=64, backend=place.backend)

    out, grads = torch.compile(function, fullgraph=True)(*maps)
    expected, eager = function(*maps)
    assert_near(out.loss, expected.loss)
    for ours, theirs in zip(grads, eager, strict=True):
        assert ours.stride() == theirs.stride()
        assert_near(ours, theirs)


# --- only on a GPU ---------------------------------------------------------------------------------------------------


def test_few_launches(gpu: Place) -> None:
    """Weights, then error and gradient of all maps, then the sum of the samples."""
    if gpu.backend != "cuda":
        pytest.skip("the number of the CUDA C++ kernels")
    maps = on(gpu, make(BF16, BF16, SIZES["many"]))
    camkd_feature_loss_and_grad(*maps, backend="cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        camkd_feature_loss_and_grad(*maps, backend="cuda")
        torch.cuda.synchronize()
    # Of tensors filled with NaN by the tests' settings, which users do not have.
    ours = [event.key for event in profile.key_averages() if "camkd" in event.key]
    assert 1 <= len(ours) <= 3, ours


def test_one_call_is_bitwise_the_general_path(gpu: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradient, and the stored gradient of the autograd form; on a stream of the caller's."""
    if gpu.backend != "cuda":
        pytest.skip("the calls of the CUDA C++ kernels")
    from camkd_fast.backends import cuda

    assert cuda.whole_losses.connected
    maps, scale = on(gpu, make(F32, BF16, SIZES["many"])), torch.tensor([8.0], device=gpu.device)
    maps = maps._replace(student=[MAP_LAYOUTS["channels_last"](r) for r in maps.student])
    options = {"beta": 1.0, "reduction": "mean", "num_items": None, "ignore_index": -100, "loss_scale": scale}
    assert cuda.whole_losses.feature_loss_and_grad(*maps, *options.values()) is not None
    leaves, results = [r.clone().requires_grad_() for r in maps.student], []
    weights = torch.rand(len(leaves), 300, device=gpu.device).requires_grad_()
    assert cuda.whole_losses.whole_feature_loss(leaves, maps.teachers, weights, "mean", None) is not None
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream(gpu.device)):
        for connected in (True, False):
            monkeypatch.setattr(cuda.whole_losses, "connected", connected)
            out, grads = camkd_feature_loss_and_grad(*maps, loss_scale=scale, backend="cuda")
            loss = weighted_feature_loss(leaves, maps.teachers, weights, backend="cuda")
            results.append([*out, *grads, loss.detach(), *torch.autograd.grad(loss, leaves)])
        torch.cuda.current_stream().synchronize()
    for ours, expected in zip(*results, strict=True):
        assert ours.stride() == expected.stride() and torch.equal(ours, expected)


def test_the_autograd_form_in_a_cuda_graph(gpu: Place) -> None:
    maps, other = (on(gpu, make(F32, F32, SIZES["many"])) for _ in range(2))
    for x in (*other.student, *other.logits):
        x.mul_(1.5)
    leaves = [x.requires_grad_() for x in (*maps.student, *maps.logits)]

    def gradients() -> tuple[Tensor, ...]:
        weights, _ = confidence_weights(maps.logits, maps.target, backend=gpu.backend)
        return torch.autograd.grad(
            3 * weighted_feature_loss(maps.student, maps.teachers, weights, backend=gpu.backend), leaves
        )

    side = torch.cuda.Stream(gpu.device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            gradients()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads = gradients()
    with torch.no_grad():
        for leaf, new in zip(leaves, (*other.student, *other.logits), strict=True):
            leaf.copy_(new)
    expected = gradients()
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_a_cuda_graph_replays_on_new_inputs(gpu: Place) -> None:
    maps, other = (on(gpu, make(BF16, BF16, SIZES[size])) for size in ("many", "many"))
    for tensors in (other.student, other.logits):
        for x in tensors:
            x.mul_(1.5)
    side = torch.cuda.Stream(gpu.device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            camkd_feature_loss_and_grad(*maps, backend=gpu.backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, grads = camkd_feature_loss_and_grad(*maps, backend=gpu.backend)
    expected, eager = camkd_feature_loss_and_grad(*other, backend=gpu.backend)
    for mine, theirs in ((maps.student, other.student), (maps.logits, other.logits)):
        for x, new in zip(mine, theirs, strict=True):
            x.copy_(new)
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out.loss, expected.loss)
        assert all(torch.equal(a, b) for a, b in zip(grads, eager, strict=True))


def test_memory_beyond_the_inputs_is_one_gradient(gpu: Place) -> None:
    if gpu.backend == "reference":
        pytest.skip("the reference makes float32 copies")
    with torch.device(gpu.device):
        student, teachers = ([torch.randn(64, 256, 32, 32).bfloat16() for _ in range(2)] for _ in range(2))
        target, logits = torch.arange(64), [torch.randn(64, 100) for _ in range(2)]
    teachers = [MAP_LAYOUTS["channels_last"](f) for f in teachers]
    camkd_feature_loss_and_grad(student, teachers, logits, target, backend=gpu.backend)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    _, grads = camkd_feature_loss_and_grad(student, teachers, logits, target, backend=gpu.backend)
    beyond = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    assert beyond <= sum(grad.nbytes for grad in grads) + 2**20
