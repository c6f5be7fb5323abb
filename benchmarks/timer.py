"""The one timer: several subjects in turn, round after round, so that a noisy machine hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleaved(
    subjects: Mapping[str, Callable[[], object]], *, seconds: float, rounds: tuple[int, int] = (9, 400)
) -> dict[str, list[float]]:
    """Wall-clock seconds of every subject, one entry a round; entry i of each was taken in the same round.

    Args:
        subjects: what to time, under its name. Each is called three times first: compilation, page faults, threads.
        seconds: rounds stop after this long, or at the upper bound of `rounds`, but not before the lower one.
    """
    for subject in subjects.values():
        for _ in range(3):
            subject()
    times: dict[str, list[float]] = {name: [] for name in subjects}
    begin = time.perf_counter()
    while len(next(iter(times.values()))) < rounds[0] or (
        time.perf_counter() - begin < seconds and len(next(iter(times.values()))) < rounds[1]
    ):
        for name, subject in subjects.items():
            start = time.perf_counter()
            subject()
            times[name].append(time.perf_counter() - start)
    return times


def percentiles(times: list[float]) -> dict[str, float]:
    """p20, p50 and p80 in milliseconds."""
    p20, _, p80 = (statistics.quantiles(times, n=5)[i] for i in (0, 1, 3))
    return {"p20_ms": 1e3 * p20, "p50_ms": 1e3 * statistics.median(times), "p80_ms": 1e3 * p80}


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def copy_bandwidth(megabytes: int = 256) -> float:
    """GB/s of `Tensor.copy_` between two buffers that fit no cache, bytes read plus bytes written."""
    source = torch.ones(megabytes * 2**20 // 4)
    target = torch.empty_like(source)
    times = interleaved({"copy": lambda: target.copy_(source)}, seconds=2, rounds=(9, 30))["copy"]
    return 2 * source.numel() * 4 / statistics.median(times) / 1e9
