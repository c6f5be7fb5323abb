"""The device work of a training step as one CUDA graph: recorded once, then replayed by a single launch.

A training step of small models is some hundred kernels of a few microseconds, and launching them one by one takes
several times as long as running them. A replay launches them all at once, on the same addresses and with the same
numbers as when they were recorded. So everything that differs between two steps lives in `StepInputs`, tensors that
are filled before the replay, and random numbers come from the default generator, which the graph reads anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ..errors import first_line
from .config import PrecisionConfig
from .distributed import World
from .step_inputs import StepInputs

log = logging.getLogger(__name__)

WARM_UP = 3  # eager steps before a recording: libraries choose algorithms, torch.compile compiles both passes


class Recorder(Protocol):
    """Records work on a device. The tests have one for the CPU."""

    def side_stream(self) -> AbstractContextManager[object]:
        """Around the steps before a recording. Autograd adds gradients on the stream that it first saw."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record `work`, which does not run, and return a function that runs it.

        Raises:
            RuntimeError: the work cannot be recorded: it synchronises, or allocates in a way that a graph cannot.
        """


class CudaRecorder:
    """Records CUDA graphs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._failed: list[torch.cuda.CUDAGraph] = []  # torch's allocator keeps references to them

    def side_stream(self) -> AbstractContextManager[object]:
        return _Beside(self._stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        try:
            return self._capture(work).replay
        except RuntimeError:
            # A failed capture leaves the default generator in capture mode, where eager steps cannot draw from it.
            # A capture that succeeds ends that mode.
            self._capture(lambda: torch.empty(1, device=self._device).zero_())
            raise

    def _capture(self, work: Callable[[], object]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream(self._device)
        try:
            # Other threads, such as a loader's, may call CUDA meanwhile.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                work()
        except RuntimeError:
            self._failed.append(graph)
            raise
        finally:
            torch.cuda.set_stream(before)  # a failed capture leaves its own stream
        return graph


class _Beside:
    """The block runs on `stream`, after what the current stream holds and before what it gets next."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream, self._context = stream, torch.cuda.stream(stream)

    def __enter__(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        self._context.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(*error)
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


class StepGraph:
    """Runs the device work of full batches: the first steps eagerly, then by replaying a graph.

    Args:
        recorder: for `device`.
        work: of one step on its inputs, tensors on the device; must not depend on anything else that changes between
            steps.

    Attributes:
        refusal: why the work could not be recorded, or None. All steps run eagerly then.
    """

    def __init__(self, recorder: Recorder, device: torch.device, work: Callable[[Sequence[Tensor]], None]) -> None:
        self._recorder, self._device, self._work = recorder, device, work
        self._inputs: StepInputs | None = None
        self._replay: Callable[[], None] | None = None
        self._steps = 0
        self.refusal: str | None = None

    def __call__(self, inputs: Sequence[Tensor]) -> None:
        """Run the work on `inputs`, which have the number, shapes, dtypes and devices of the first call."""
        if self._inputs is None:
            self._inputs = StepInputs(inputs, self._device)
        self._inputs.fill(inputs)
        work = partial(self._work, self._inputs.tensors)
        if self._replay is None and self._steps >= WARM_UP and self.refusal is None:
            self._record(work)
        if self._replay is not None:
            self._replay()
        elif self.refusal is not None:
            work()
        else:
            self._steps += 1
            with self._recorder.side_stream():
                work()

    def forget(self) -> None:
        """Record anew: memory that the work reads or writes has been replaced."""
        self._inputs, self._replay, self._steps = None, None, 0

    def _record(self, work: Callable[[], None]) -> None:
        try:
            self._replay = self._recorder.record(work)
        except RuntimeError as error:
            self.refusal = _first_cause(error)
            log.warning("training steps run without a CUDA graph: %s", self.refusal)


def _first_cause(error: BaseException) -> str:
    """The error that came first: ending a capture that failed raises an error of its own."""
    while error.__context__ is not None:
        error = error.__context__
    return first_line(error)


def recorder_for(precision: PrecisionConfig, world: World) -> Recorder | None:
    """The recorder of CUDA graphs; None where steps run eagerly."""
    if precision.cuda_graphs == "on" and world.device.type != "cuda":
        raise ValueError(f"cuda_graphs needs a GPU, but the device is {world.device.type}")
    if precision.cuda_graphs == "off" or world.device.type != "cuda":
        return None
    if world.size > 1:
        log.warning("training steps run without a CUDA graph: %d processes exchange gradients", world.size)
        return None
    return CudaRecorder(world.device)
