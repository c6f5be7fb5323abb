"""The cost of one call at 64 x 100, K = 3, loss + backward, where launches and Python dominate.

For every contestant: host time until the device has finished, the same for a CUDA graph replay, and, from
torch.profiler, device time and number of kernel launches. Without a GPU only the first is measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks import contestants, profiler, shapes, timer
from benchmarks.conftest import Suite
from benchmarks.timer import Subject

pytestmark = pytest.mark.benchmark(timer=timer.CLOCK)


def recorded(subject: Subject, device: torch.device) -> Subject:
    """The call captured as a CUDA graph, on the stream of the warm-up: autograd adds gradients on the first it saw."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(timer.WARM_UP):
            subject()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        subject()
    return graph.replay


def test_small_batch(benchmark: Any, suite: Suite) -> None:
    shape = shapes.Shape(64, 100, 3, torch.float32 if suite.device.type == "cpu" else torch.bfloat16)
    batch = shape.batch(suite.device)
    others, missing = contestants.others(suite.device, suite.max_autotune)
    truth = others["eager"].grad(batch)
    calls: dict[str, Callable[[shapes.Batch], object]] = {}
    for name, contestant in (contestants.ours(batch) | others).items():
        reason = contestants.disagreement(contestant, truth, batch)
        if reason is not None:
            missing.append(f"{name}: {reason}")
            continue
        calls[f"{name} backward"] = contestant.backward
        if name.startswith("camkd"):
            calls[f"{name} value + gradient"] = contestant.grad
    for reason in missing:
        suite.note(f"left out: {reason}")
    subjects: dict[str, Subject] = {name: partial(call, batch) for name, call in calls.items()}
    watched = next(iter(subjects))
    times = timer.interleaved(
        subjects, suite.device, seconds=suite.seconds(5.0), benchmark=benchmark, watch=watched, wall=True
    )
    for name, subject in subjects.items():
        row = {"name": name, "floor_bytes": shape.floor_bytes(), "call_us": 1e6 * statistics.median(times[name])}
        row |= {"graph_us": None, "device_us": None, "launches": None}
        if suite.device.type == "cuda":
            found = profiler.profiled(subject, suite.device)
            row["device_us"], row["launches"] = found.device_us, found.kernels
            # A leaf that no stream but that of the recording has seen
            row["graph_us"] = replayed(suite, name, partial(calls[name], batch.with_own_leaf()))
        suite.record(None, row)
    benchmark.extra_info.update(suite.rows[0])
    if suite.device.type == "cpu":
        suite.note("CUDA graphs, device times and launches need a GPU.")


def replayed(suite: Suite, name: str, subject: Subject) -> float | None:
    """Microseconds of a replay. None, with a note, if the call cannot be captured."""
    try:
        replay = recorded(subject, suite.device)
    except RuntimeError as error:
        if name.startswith("camkd"):
            raise
        suite.note(f"{name} cannot be captured: {str(error).splitlines()[0]}")
        return None
    times = timer.interleaved({name: replay}, suite.device, seconds=0.5, wall=True)[name]
    return 1e6 * statistics.median(times)
