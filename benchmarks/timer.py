"""The only timer. Every round times all subjects once, so that noise on the machine affects all of them equally.

On a CPU it reads perf_counter around the call. On a GPU it reads CUDA events around the call, after a write of twice
the L2 cache size: no subject finds its inputs in the cache, and the queue is not empty when a kernel is launched.

pytest-benchmark runs the rounds (`benchmark.pedantic`) and reads `CLOCK`, which advances only while the watched subject
runs. Its table, its JSON and its comparison of commits therefore hold exactly the times measured here.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Subject = Callable[[], object]
WARM_UP = 3  # calls: compilation, page faults, threads


class Clock:
    """Total seconds of the watched subject so far."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


CLOCK = Clock()


def wall_seconds(subject: Subject, device: torch.device) -> float:
    """Host time from the call until the device has finished."""
    start = time.perf_counter()
    subject()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


class _EventTimer:
    """Device seconds between two CUDA events around a call that starts with a cold L2 cache."""

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._device, self._flush = device, torch.empty(2 * cache, dtype=torch.uint8, device=device)

    def __call__(self, subject: Subject, device: torch.device) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        subject()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3


def interleaved(
    subjects: Mapping[str, Subject],
    device: torch.device,
    *,
    seconds: float,
    rounds: tuple[int, int] = (9, 400),
    warm_up: int = WARM_UP,
    benchmark: Any = None,
    watch: str = "",
    wall: bool = False,
) -> dict[str, list[float]]:
    """Seconds of every subject, one entry per round; entries with the same index come from the same round.

    Args:
        subjects: functions to time, by name.
        seconds: approximate time for all rounds; `rounds` sets the least and the greatest number of rounds.
        benchmark: pytest-benchmark's fixture, which then runs the rounds and reports subject `watch`.
        wall: use host time on a GPU too.
    """
    measure = _EventTimer(device) if device.type == "cuda" and not wall else wall_seconds
    for subject in subjects.values():
        for _ in range(warm_up):
            measure(subject, device)
    times: dict[str, list[float]] = {name: [] for name in subjects}

    def one_round() -> None:
        for name, subject in subjects.items():
            times[name].append(measure(subject, device))
        if watch:
            CLOCK.seconds += times[watch][-1]

    number = min(max(int(seconds / wall_seconds(one_round, device)), rounds[0]), rounds[1])
    for values in times.values():
        values.clear()  # the first round only measured how long a round takes
    if benchmark is not None:
        benchmark.pedantic(one_round, rounds=number)
    else:
        for _ in range(number):
            one_round()
    return times


def percentiles(times: list[float]) -> dict[str, float]:
    """p20, p50 and p80 in milliseconds."""
    p20, _, p80 = (statistics.quantiles(times, n=5)[i] for i in (0, 1, 3))
    return {"p20_ms": 1e3 * p20, "p50_ms": 1e3 * statistics.median(times), "p80_ms": 1e3 * p80}


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def peak_bytes(subject: Subject, device: torch.device) -> int | None:
    """Peak GPU memory of one call beyond what was allocated before it.

    None on a CPU, where the resident set includes memory kept by the allocator; tests/losses/test_memory.py measures it
    in a separate process.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    subject()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def copy_bandwidth(device: torch.device, seconds: float = 2.0) -> float:
    """GB/s of `Tensor.copy_` between two buffers larger than any cache, counting bytes read and bytes written."""
    elements = (2**30 if device.type == "cuda" else 2**28) // 4
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    times = interleaved({"copy": lambda: target.copy_(source)}, device, seconds=seconds, rounds=(9, 30))["copy"]
    return 2 * source.numel() * 4 / statistics.median(times) / 1e9
