"""The device work of a training step as one CUDA graph: recorded once, then replayed by a single launch.

A training step of small models is some hundred kernels of a few microseconds, and launching them one by one takes
several times as long as running them. A replay launches them all at once, on the same addresses and with the same
numbers as when they were recorded. So everything that differs between two steps lives in `StepInputs`, tensors that
are filled before the replay, and random numbers come from generators that the graph reads anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

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

    def side_stream(self) -> AbstractContextManager[object]:
        return _Beside(self._stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as a loader's, may call CUDA meanwhile.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay


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
        work: of one step on its inputs, tensors on the device or the host; must not depend on anything else that
            changes between steps.

    Attributes:
        refusal: why the work could not be recorded, or None. All steps run eagerly then.
    """

    def __init__(self, recorder: Recorder, device: torch.device, work: Callable[[Sequence[Tensor]], None]) -> None:
        self._recorder, self._device, self._work = recorder, device, work
        self._inputs: list[Tensor] = []
        self._replay: Callable[[], None] | None = None
        self._steps = 0
        self.refusal: str | None = None

    def __call__(self, inputs: Sequence[Tensor]) -> None:
        """Run the work on `inputs`, whose number, shapes and dtypes are those of the first call."""
        if self.refusal is not None:
            self._work(inputs)
        elif self._steps < WARM_UP:
            with self._recorder.side_stream():
                self._work(inputs)
            self._steps += 1
        else:
            if self._replay is None:
                self._inputs = [torch.empty_like(tensor, device=self._device) for tensor in inputs]
            for mine, given in zip(self._inputs, inputs, strict=True):
                mine.copy_(given, non_blocking=True)
            if self._replay is None:
                self._record()
            (self._replay or self._eagerly)()

    def forget(self) -> None:
        """Record anew: memory that the work reads or writes has been replaced."""
        self._replay, self._steps = None, 0

    def _record(self) -> None:
        try:
            self._replay = self._recorder.record(lambda: self._work(self._inputs))
        except RuntimeError as error:
            self.refusal = (str(error).strip() or repr(error)).splitlines()[0]
            log.warning("training steps run without a CUDA graph: %s", self.refusal)

    def _eagerly(self) -> None:
        self._work(self._inputs)
