"""The loss on a device: synchronisation, streams, graphs, memory, several devices, torch.compile, autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from camkd_fast import CAMKDFeatureLoss, camkd_loss, camkd_loss_and_grad
from camkd_fast.losses.formula import Formula
from tests.support.cases import Case, make_case, on
from tests.support.evaluate import run, run_value_and_grad
from tests.support.gpu import CUDA, NO_GPU, Place
from tests.support.tolerance import assert_accurate, assert_near
from tests.support.truth import naive, truth

MB = 2**20
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@contextmanager
def no_synchronisation(device: torch.device) -> Iterator[None]:
    """Inside, a synchronisation of the host with the device is an error."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def step(case: Case, student: torch.Tensor, backend: str) -> torch.Tensor:
    """Loss and backward into an empty student.grad."""
    student.grad = None
    loss = camkd_loss(student, case.teachers, case.target, backend=backend, **case.options()).loss
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("C", [100, 33000])
@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"weighting": "entropy"}, {"two_labels": True}], ids=str)
def test_the_host_never_synchronises(place: Place, options: dict[str, object], C: int) -> None:
    case = on(make_case(16, C, 3, BF16, ignored=0.2, **options), place.device)
    student = case.student.detach().requires_grad_()
    scale = torch.tensor([8.0], device=place.device)
    module = CAMKDFeatureLoss(4, [6, 8], backend=place.backend).to(place.device)
    feature = torch.randn(16, 4, 4, 4, device=place.device, requires_grad=True)
    teachers = [torch.randn(16, width, 4, 4, device=place.device) for width in (6, 8)]
    heads = [lambda f: f.mean((2, 3)), lambda f: f.mean((2, 3))[:, :6]]
    labels = torch.arange(16, device=place.device) % 6

    def everything() -> None:
        step(case, student, place.backend)
        camkd_loss_and_grad(
            case.student, case.teachers, case.target, loss_scale=scale, backend=place.backend, **case.options()
        )
        module(feature, teachers, heads, labels).loss.backward()

    everything()  # compilation may synchronise
    with no_synchronisation(place.device):
        everything()


@pytest.mark.parametrize("C", [100, 33000, 151936])
def test_on_a_side_stream(gpu: Place, C: int) -> None:
    case = on(make_case(64, C, 3, BF16, padded=False), gpu.device)
    expected = run(case, gpu.backend)
    side = torch.cuda.Stream(gpu.device)
    blocker = torch.empty(64 * MB, device=gpu.device)
    student = torch.full_like(case.student, float("nan")).requires_grad_()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        # A kernel on the default stream would run at once and read NaN.
        for _ in range(20):
            blocker.fill_(1.0)
        with torch.no_grad():
            student.copy_(case.student)
        loss = step(case, student, gpu.backend)
    side.synchronize()
    assert torch.equal(loss, expected.loss) and torch.equal(student.grad, expected.grad)


# Wider than a cluster: the blocks of a row meet in device memory, whatever their number (row_loss/group_memory.cuh).
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cooperative_groups_of_different_sizes_share_their_memory(gpu: Place, reduction: str) -> None:
    if gpu.backend != "cuda":
        pytest.skip("CUDA C++ kernels only")
    widths = [(3, 128256), (40, 151936), (2, 262144), (30, 200_003)]
    cases = [
        on(make_case(N, C, 3, BF16, padded=False, ignored=0.2, reduction=reduction), gpu.device) for N, C in widths
    ]
    # The reference comes to other bits, and the first call of each width is the expected one of the others.
    expected = [run_value_and_grad(case, "cuda") for case in cases]
    for case, found in zip(cases, expected, strict=True):
        other = run_value_and_grad(case, "reference")
        assert_near(found.loss, other.loss, rtol=1e-5)
        assert_near(found.grad, other.grad)
    streams = [torch.cuda.Stream(gpu.device) for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(5):
        results = []
        for i, case in enumerate(cases):
            with torch.cuda.stream(streams[i % 2]):
                results.append(run_value_and_grad(case, "cuda"))
        torch.cuda.synchronize()
        for found, result in zip(expected, results, strict=True):
            assert torch.equal(found.loss, result.loss) and torch.equal(found.grad, result.grad)


@pytest.mark.parametrize("entry", ["backward", "value and gradient"])
@pytest.mark.parametrize("C", [100, 33000, 151936])
def test_a_cuda_graph_replays_on_new_inputs(gpu: Place, C: int, entry: str) -> None:
    case = on(make_case(64, C, 3, BF16, padded=False), gpu.device)
    other = on(make_case(64, C, 3, BF16, padded=False, seed=1), gpu.device)
    student = case.student.clone().requires_grad_()

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        if entry == "backward":
            loss = step(case, student, gpu.backend)
            return loss, student.grad
        out, grad = camkd_loss_and_grad(student, case.teachers, case.target, backend=gpu.backend)
        return out.loss, grad

    side = torch.cuda.Stream(gpu.device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grad = call()
    for given in (case, other):
        with torch.no_grad():
            student.copy_(given.student)
            for z, new in zip(case.teachers, given.teachers, strict=True):
                z.copy_(new)
            case.target.copy_(given.target)
        graph.replay()
        torch.cuda.synchronize()
        now = case.with_(student=student.detach())
        expected = (run if entry == "backward" else run_value_and_grad)(now, gpu.backend)
        assert torch.equal(loss, expected.loss) and torch.equal(grad, expected.grad)


@pytest.mark.parametrize("entry", ["camkd_loss", "camkd_loss_and_grad"])
@pytest.mark.parametrize(
    ("N", "C", "K", "dtype"), [(2048, 32000, 3, torch.float32), (512, 128256, 3, BF16), (65536, 100, 5, torch.float32)]
)
def test_one_gradient_and_1_mb(gpu: Place, N: int, C: int, K: int, dtype: torch.dtype, entry: str) -> None:
    if gpu.backend == "reference":
        pytest.skip("the reference makes float32 copies")

    def inputs(rows: int) -> Case:
        student, *teachers = (torch.randn(rows, C, device=gpu.device, dtype=dtype) for _ in range(K + 1))
        return Case(student, tuple(teachers), torch.arange(rows, device=gpu.device) % C)

    def call(case: Case, student: torch.Tensor) -> torch.Tensor:
        if entry == "camkd_loss":
            step(case, student, gpu.backend)
            return student.grad
        return camkd_loss_and_grad(student, case.teachers, case.target, backend=gpu.backend)[1]

    small, case = inputs(8), inputs(N)
    call(small, small.student.requires_grad_())
    student = case.student.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    # Requested bytes: the allocator rounds them up to blocks of 2 MB.
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    grad = call(case, student)
    torch.cuda.synchronize()
    beyond = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    assert beyond <= grad.numel() * grad.element_size() + 4 * (3 + 3 * K) * N + MB, f"{beyond / MB:.1f} MB"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second CUDA device")
def test_tensors_on_a_device_that_is_not_the_current_one(gpu: Place) -> None:
    case = make_case(16, 100, 3)
    first, second = (on(case, torch.device("cuda", i)) for i in range(2))
    expected = run(first, gpu.backend)
    with torch.cuda.device(0):
        actual = run(second, gpu.backend)
    assert actual.grad.device.index == 1 and torch.equal(actual.grad.cpu(), expected.grad.cpu())


@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
def test_tensors_on_different_devices_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"teacher_logits\[1\].*cpu"):
        z = torch.randn(4, 10, device=CUDA)
        camkd_loss(z, [z, z.cpu()], torch.zeros(4, dtype=torch.int64, device=CUDA))


def test_fullgraph_equals_eager_with_few_recompilations(place: Place) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def loss(student: torch.Tensor, teachers: list[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        return camkd_loss(student, teachers, target, backend=place.backend).loss

    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for N in (32, 17, 64, 9, 33, 128, 5, 48, 31, 2):
        case = on(make_case(N, 100, 3, padded=False), place.device)
        student = case.student.detach().requires_grad_()
        compiled(student, list(case.teachers), case.target).backward()
        assert_accurate(student.grad, truth(case).grad, naive(case).grad)
    assert counter.frame_count <= 3, f"compiled {counter.frame_count} times for 10 batch sizes"


def test_inductor_gives_the_eager_gradient(gpu: Place) -> None:
    case = on(make_case(16, 33), gpu.device)
    body, twin = (torch.nn.Linear(33, 33, device=gpu.device) for _ in range(2))
    twin.load_state_dict(body.state_dict())

    def objective(model: torch.nn.Module) -> torch.Tensor:
        out = camkd_loss(model(case.student).relu(), case.teachers, case.target, backend=gpu.backend)
        return out.loss * 2 + out.hard

    torch.compile(objective, fullgraph=True)(body).backward()
    objective(twin).backward()
    assert_near(body.weight.grad, twin.weight.grad)


@pytest.mark.parametrize("what", ["autograd", "no gradient", "scaled", "given weights", "two labels"])
def test_opcheck(place: Place, what: str) -> None:
    case = on(make_case(6, 10, padded=False, ignored=0.3, two_labels=what == "two labels"), place.device)
    arguments = {
        "student": case.student if what == "no gradient" else case.student.requires_grad_(),
        "teachers": list(case.teachers),
        "target": case.target,
        "second_target": case.second_target,
        "mix": case.mix,
        "weights": torch.rand(3, 6, device=place.device).requires_grad_() if what == "given weights" else None,
        "grad_scale": torch.tensor([0.25], device=place.device) if what == "scaled" else None,
        **dict(zip(("constants", "weighting", "divergence", "ignore_index"), Formula().constants(), strict=True)),
        "needs_grad": what != "no gradient",
        "backend": place.backend,
    }
    torch.library.opcheck(torch.ops.camkd_fast.row_loss.default, tuple(arguments.values()))


@pytest.mark.parametrize("entry", ["backward", "value and gradient"])
def test_autocast_and_a_grad_scaler(place: Place, entry: str) -> None:
    kind = place.device.type
    case = on(make_case(64, 100, 3, torch.float16, padded=False), place.device)
    body = torch.nn.Linear(32, 100, device=place.device)
    images = torch.randn(64, 32, device=place.device)
    optimizer = torch.optim.SGD(body.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler(kind, init_scale=1024.0)
    with torch.autocast(kind, dtype=torch.float16):
        logits = body(images)
        if entry == "backward":
            loss = camkd_loss(logits, case.teachers, case.target, backend=place.backend).loss
    assert logits.dtype == torch.float16
    if entry == "backward":
        scaler.scale(loss).backward()
    else:
        scale = scaler.scale(torch.ones(1, device=place.device))
        _, grad = camkd_loss_and_grad(logits, case.teachers, case.target, loss_scale=scale, backend=place.backend)
        logits.backward(grad)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    R = truth(case.with_(student=logits.detach())).grad.mT @ images.double()
    error = float((body.weight.grad - R).norm() / R.norm())
    assert error < 3e-3, f"relative error {error:.1e}"  # of which nearly all is the matrix product in float16
