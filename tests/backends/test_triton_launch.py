"""Kept kernels and counters: what is kept, for which launches, and what is left to Triton. Kernels are stand-ins here.

The last test compares keys with those of Triton. tests/gpu launches real kernels.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":  # set by conftest.py without a GPU
    pytest.skip("these launches are stand-ins, whose tensors are on the CPU", allow_module_level=True)

import triton.language as tl

from tests.support.torch_version import skip_before_triton

skip_before_triton(3, 6)  # later launches are direct from it on

counters, launcher = (importlib.import_module(f"camkd_fast.kernels.{name}") for name in ("counters", "launcher"))

F32, BF16 = torch.float32, torch.bfloat16
AT = 0  # the device of every tensor here, unless `elsewhere` says otherwise


class Compiled:
    """In the place of triton.compiler.CompiledKernel."""

    def __init__(self, backend: str = "cuda") -> None:
        self.metadata = SimpleNamespace(target=SimpleNamespace(backend=backend))
        self.function, self.packed_metadata = object(), (4, 1, 0)
        self.runs: list[tuple[Any, ...]] = []

    def run(self, *arguments: Any) -> None:
        self.runs.append(arguments)


class Kernel:
    """In the place of triton.JITFunction: pointers a and b, numbers N and strides, constants K and BLOCK."""

    arg_names = ("a", "b", "N", "strides", "K", "BLOCK")

    def __init__(self) -> None:
        self.params = [SimpleNamespace(do_not_specialize=name == "N") for name in self.arg_names]
        self.pre_run_hooks: list[Any] = []
        self.calls: list[tuple[Any, ...]] = []
        self.returned: list[Any] = []
        self.make: Callable[[], Any] = Compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(*arguments: Any, **constants: Any) -> Any:
            self.calls.append((grid, arguments, constants))
            self.returned.append(self.make())
            return self.returned[-1]

        return launch

    def launch(self, N: int = 5, strides: tuple[int, ...] = (3,), K: int = 2, BLOCK: int = 16, warps: int = 4) -> Any:
        return launcher.Launcher(self, 7, (N, strides), {"BLOCK": BLOCK, "K": K}, num_warps=warps)


class Devices(SimpleNamespace):
    """The current device, its streams, and where tensors are."""

    current: int = AT
    elsewhere: dict[int, int]  # by address


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Devices:
    devices = Devices(elsewhere={})

    class Guard:
        def __init__(self, device: int) -> None:
            self.device = device

        def __enter__(self) -> None:
            self.before, devices.current = devices.current, self.device

        def __exit__(self, *_: object) -> None:
            devices.current = self.before

    monkeypatch.setattr(launcher, "device_of", lambda x: devices.elsewhere.get(x.data_ptr(), AT))
    monkeypatch.setattr(launcher, "current_device", lambda: devices.current)
    monkeypatch.setattr(launcher, "current_stream", lambda device: 1000 + device)
    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(launcher, "JITFunction", Kernel)
    monkeypatch.setattr(launcher, "CompiledKernel", Compiled)
    monkeypatch.setattr(launcher, "_DIRECT", True)
    return devices


@pytest.fixture
def kernel(devices: Devices) -> Kernel:
    return Kernel()


@pytest.fixture
def a() -> torch.Tensor:
    return aligned(F32)


def aligned(dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
    """64 elements at `offset` elements behind an address that is a multiple of 64."""
    memory = torch.zeros(256, dtype=dtype)
    return memory[(-memory.data_ptr() % 64) // memory.element_size() + offset :][:64]


def test_the_first_launch_is_triton_s_and_later_ones_are_direct(kernel: Kernel, a: torch.Tensor) -> None:
    launch = kernel.launch()
    launch(a, (a, a))
    assert kernel.calls == [((7,), (a, (a, a), 5, (3,)), {"BLOCK": 16, "K": 2, "num_warps": 4})]
    launch(a, (a, a))
    other = aligned(F32)
    launch(other, (a, other))
    (compiled,) = kernel.returned
    assert len(kernel.calls) == 1
    # Grid, stream, function, metadata, hooks; addresses for tensors; numbers; constants in the order of the parameters.
    head = (7, 1, 1, 1000 + AT, compiled.function, compiled.packed_metadata, None, None, None)
    here, there = a.data_ptr(), other.data_ptr()
    assert compiled.runs == [(*head, here, (here, here), 5, (3,), 2, 16), (*head, there, (here, there), 5, (3,), 2, 16)]


@pytest.mark.parametrize(
    "change",
    [
        {"K": 3}, {"BLOCK": 32}, {"warps": 8}, {"N": 2**31},
        {"strides": (1,)}, {"strides": (16,)}, {"strides": (3, 3)}, {"strides": (2**31 + 1,)},
    ],
)  # fmt: skip
def test_launches_of_another_kind_have_kernels_of_their_own(
    kernel: Kernel, a: torch.Tensor, change: dict[str, Any]
) -> None:
    for launch in (kernel.launch(), kernel.launch(**change), kernel.launch(), kernel.launch(**change)):
        launch(a, a)
    assert [len(compiled.runs) for compiled in kernel.returned] == [1, 1]
    assert kernel.returned[1].runs[0][-4:-2] == (change.get("N", 5), change.get("strides", (3,)))


@pytest.mark.parametrize("change", [{"N": 1}, {"N": 16}, {"N": 6}, {"strides": (5,)}])
def test_launches_of_one_kind_share_a_kernel(kernel: Kernel, a: torch.Tensor, change: dict[str, Any]) -> None:
    """N is not specialised; 3 and 5 are neither 1 nor multiples of 16."""
    kernel.launch()(a, a)
    kernel.launch(**change)(a, a)
    (compiled,) = kernel.returned
    assert compiled.runs[0][-4:-2] == (change.get("N", 5), change.get("strides", (3,)))


@pytest.mark.parametrize(
    "second",
    [
        lambda: aligned(F32, 1), lambda: aligned(BF16), lambda: aligned(torch.int32), lambda: None, lambda: 2.0,
        lambda: (aligned(F32),), lambda: (aligned(F32), aligned(F32)), lambda: (aligned(F32, 1),),
    ],
    ids=["unaligned", "bfloat16", "int32", "None", "number", "tuple", "longer tuple", "tuple of unaligned"],
)  # fmt: skip
def test_pointers_of_another_kind(kernel: Kernel, a: torch.Tensor, second: Callable[[], Any]) -> None:
    launch = kernel.launch()
    for _ in range(2):
        launch(a, a)
        launch(a, second())
    assert [len(compiled.runs) for compiled in kernel.returned] == [1, 1]


def test_the_alignment_is_to_16_bytes(kernel: Kernel, a: torch.Tensor) -> None:
    launch = kernel.launch()
    for offset in (0, 4, 8, 2, 3):
        launch(a, aligned(F32, offset))
    assert [len(compiled.runs) for compiled in kernel.returned] == [2, 1]


def test_numbers_in_the_place_of_pointers_are_passed_on(kernel: Kernel, a: torch.Tensor) -> None:
    launch = kernel.launch()
    for number in (2.0, 3.5):
        launch(a, number)
    launch(a, None)
    assert [[run[10] for run in compiled.runs] for compiled in kernel.returned] == [[3.5], []]
    with pytest.raises(AssertionError, match="must be a float, got 3"):
        launch(a, 3)


def test_every_device_has_its_kernel_stream_and_guard(kernel: Kernel, devices: Devices, a: torch.Tensor) -> None:
    b = aligned(F32)
    devices.elsewhere[b.data_ptr()] = 1
    launch, seen = kernel.launch(), []
    kernel.make = lambda: seen.append(devices.current) or Compiled()
    for x in (a, b, a, b, b):
        launch(x, x)
    assert seen == [0, 1] and devices.current == 0
    assert [[run[3] for run in compiled.runs] for compiled in kernel.returned] == [[1000], [1001, 1001]]


def test_tensors_of_two_devices_are_left_to_triton(kernel: Kernel, devices: Devices, a: torch.Tensor) -> None:
    """Its launch asks the driver about every pointer and refuses those of the host."""
    b = aligned(F32)
    launch = kernel.launch()
    launch(a, b)
    for place in (-1, 1):
        devices.elsewhere[b.data_ptr()] = place
        for pointer in (b, (a, b)):
            before = len(kernel.calls)
            for _ in range(2):
                launch(a, pointer)
            assert len(kernel.calls) == before + 2
    assert not any(compiled.runs for compiled in kernel.returned)


@pytest.mark.parametrize("made", [lambda: None, lambda: Compiled("hip"), lambda: SimpleNamespace(run=None)])
def test_what_is_not_a_kernel_for_cuda_is_not_kept(kernel: Kernel, a: torch.Tensor, made: Callable[[], Any]) -> None:
    kernel.make = made
    launch = kernel.launch()
    for _ in range(3):
        launch(a, a)
    assert len(kernel.calls) == 3


def test_other_releases_and_the_interpreter_launch_by_triton(
    kernel: Kernel, a: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("_DIRECT", False), ("JITFunction", type("Other", (), {}))):
        with monkeypatch.context() as patch:
            patch.setattr(launcher, name, value)
            launch = kernel.launch()
        before = len(kernel.calls)
        for _ in range(2):
            launch(a, a)
        assert len(kernel.calls) == before + 2


@pytest.mark.parametrize("hook", ["enter", "exit", "pre_run"])
def test_hooks_see_every_launch(kernel: Kernel, a: torch.Tensor, hook: str) -> None:
    triton = importlib.import_module("triton")
    launch = kernel.launch()
    for _ in range(2):
        launch(a, a)
    hooks = {
        "enter": triton.knobs.runtime.launch_enter_hook.calls,
        "exit": triton.knobs.runtime.launch_exit_hook.calls,
        "pre_run": kernel.pre_run_hooks,
    }[hook]
    hooks.append(print)
    launch(a, a)
    hooks.remove(print)
    assert len(kernel.calls) == 2
    launch(a, a)
    assert len(kernel.calls) == 2


def test_threads_share_kernels(kernel: Kernel, a: torch.Tensor) -> None:
    launch = kernel.launch()
    launch(a, a)
    threads = [threading.Thread(target=lambda: [launch(a, a) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kernel.returned[0].runs) == 200


def test_constants_are_those_of_the_kernel(kernel: Kernel) -> None:
    with pytest.raises(AssertionError, match=r"K.*BLOCK"):
        launcher.Launcher(kernel, 7, (5, (3,)), {"BLOCK": 16, "GROUP": 2})


# --- counters --------------------------------------------------------------------------------------------------------


@pytest.fixture
def capturing(devices: Devices, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether the current stream is; the stream has the number of its device."""
    state = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state[0])
    for name in ("device_of", "current_device", "current_stream"):
        monkeypatch.setattr(counters, name, getattr(launcher, name))
    before = dict(counters._of_streams)
    counters._of_streams.clear()
    yield state
    counters._of_streams.clear()
    counters._of_streams.update(before)


def test_a_stream_has_one_counter(
    capturing: list[bool], devices: Devices, a: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    b = aligned(F32)
    devices.elsewhere[b.data_ptr()] = 1
    first, other = counters.counter_for(a), counters.counter_for(b)
    assert first.dtype == torch.int32 and first.tolist() == [0]
    assert counters.counter_for(a) is first and counters.counter_for(b) is other and first is not other
    monkeypatch.setattr(counters, "current_stream", lambda device: 7)
    assert counters.counter_for(a).data_ptr() not in (first.data_ptr(), other.data_ptr())


def test_every_recorded_launch_has_a_counter_of_its_own(capturing: list[bool], a: torch.Tensor) -> None:
    """In the memory of the graph, which may be reused after the launch."""
    outside = counters.counter_for(a)
    capturing[0] = True
    one, two = counters.counter_for(a), counters.counter_for(a)
    assert len({outside.data_ptr(), one.data_ptr(), two.data_ptr()}) == 3
    assert len(counters._of_streams) == 1
    capturing[0] = False
    assert counters.counter_for(a) is outside


def test_the_stream_of_every_thread_has_no_counter(
    capturing: list[bool], a: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counters, "current_stream", lambda device: 2)
    one, two = counters.counter_for(a), counters.counter_for(a)
    assert one.data_ptr() != two.data_ptr() and not counters._of_streams


def test_the_guard_is_on_while_the_stream_is_asked(
    capturing: list[bool], devices: Devices, a: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices.elsewhere[a.data_ptr()] = 1
    seen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: seen.append(devices.current) or False)
    counters.counter_for(a)
    assert seen == [1] and devices.current == 0


# --- Triton's own specialisation -------------------------------------------------------------------------------------


def parameters(student, teachers, given, scale, N, stride, strides, formula, K: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of a kernel with every sort of parameter that ours have."""


tensors = st.builds(aligned, st.sampled_from([F32, BF16]), st.sampled_from([0, 1, 4, 8]))
integers = st.sampled_from([0, 1, 2, 3, 16, 17, 32, 2**31 - 1, 2**31, 2**31 + 1, 2**32, -1, -16, -(2**31), -(2**40)])
ARGUMENTS = (
    tensors,
    st.tuples(tensors, tensors),
    st.none() | tensors,
    tensors | st.floats(allow_nan=False),
    *(integers, integers, st.tuples(integers, integers), st.tuples(st.just(1.0), st.just(0.5))),
    st.sampled_from([1, 2]),
)


@st.composite
def neighbours(draw: st.DrawFn) -> list[list[Any]]:
    """The arguments of two launches, which differ in at most two places."""
    first = [draw(argument) for argument in ARGUMENTS]
    second = list(first)
    for i in draw(st.sets(st.integers(0, len(ARGUMENTS) - 1), max_size=2)):
        second[i] = draw(ARGUMENTS[i])
    return [first, second]


@hypothesis.settings(max_examples=400)
@hypothesis.given(neighbours())
def test_launches_with_one_key_share_a_kernel_of_triton(pair: list[list[Any]]) -> None:
    jit, compiler, backends = map(
        importlib.import_module, ("triton.runtime.jit", "triton.compiler", "triton.backends.compiler")
    )
    kernel = jit.JITFunction(parameters, do_not_specialize=["N"])
    backend = compiler.make_backend(backends.GPUTarget("cuda", 90, 32))
    bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    ours, tritons = [], []
    for arguments in pair:
        *_, specialisation, options = bind(*arguments, debug=False)
        tritons.append(jit.compute_cache_key({}, specialisation, options))
        with mock.patch.object(launcher, "_DIRECT", True):
            launch = launcher.Launcher(kernel, 1, tuple(arguments[4:-1]), {"K": arguments[-1]})
        kinds: list[object] = []
        launcher._addresses(tuple(arguments[:4]), -1, kinds)
        ours.append((id(launch._kept), kinds))
    hypothesis.event(f"one key of ours: {ours[0] == ours[1]}, one of Triton's: {tritons[0] == tritons[1]}")
    assert ours[0] != ours[1] or tritons[0] == tritons[1]
