"""What torch.profiler sees of a call: time on the device, kernels, and launches by the host."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from benchmarks import timer
from benchmarks.timer import Subject

CALLS = 20
# Names of the calls of CUDA's runtime and driver that put work on the device.
LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpy", "cudaMemset", "cuMemcpy", "cuMemset")


class Profile(NamedTuple):
    """Per call."""

    device_us: float  # summed over kernels, memory copies and fills
    busy_us: float  # in which at least one of them ran
    kernels: float  # kernels, copies and fills
    launches: float  # calls of the host that put work on the device; a graph is one


def union_us(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total


def read(events: Iterable[Any], calls: int) -> Profile:
    """Numbers of `calls` calls from torch.profiler's events."""
    events = list(events)
    on_device = [e.time_range for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    launches = sum(e.device_type == torch.autograd.DeviceType.CPU and e.name.startswith(LAUNCHES) for e in events)
    device_us = sum(span.elapsed_us() for span in on_device)
    busy_us = union_us((span.start, span.end) for span in on_device)
    return Profile(*(value / calls for value in (device_us, busy_us, len(on_device), launches)))


def profiled(subject: Subject, device: torch.device, calls: int = CALLS) -> Profile:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(calls):
            timer.wall_seconds(subject, device)
    return read(profile.events(), calls)
