"""The logit loss and its gradient against the same formulas in eager PyTorch, torch.compile and other libraries.

The two end points are defined in benchmarks/contestants.py. Every ratio is a median over interleaved rounds.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import pytest

from benchmarks import contestants, shapes, timer
from benchmarks.conftest import Suite
from benchmarks.contestants import ENDS, Contestant
from benchmarks.shapes import Batch, Shape

pytestmark = pytest.mark.benchmark(timer=timer.CLOCK)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.option
    if metafunc.function is test_against_others:
        metafunc.parametrize("shape", shapes.COMPARED[option.device], ids=str)
    elif metafunc.function is test_over_classes:
        metafunc.parametrize("shape", shapes.over_classes(option.device, option.shapes), ids=str)


def measure(
    suite: Suite, benchmark: Any, shape: Shape, batch: Batch, contestants: dict[str, Contestant], seconds: float
) -> dict[str, Any]:
    """One row: times of every contestant at both end points; "over" is the ratio of each time to ours.

    Every contestant has its own leaf tensor: on a CPU, `backward` frees the previous gradient, which can take
    milliseconds that must be counted for the contestant that allocated it.
    """
    batches = {name: batch.with_own_leaf() for name in contestants}
    subjects = {
        (name, end): partial(getattr(contestant, end), batches[name])
        for name, contestant in contestants.items()
        for end in ENDS
    }
    ours = next(iter(contestants))
    labels = {f"{name} {end}": subject for (name, end), subject in subjects.items()}
    times = timer.interleaved(
        labels, suite.device, seconds=seconds, benchmark=benchmark, watch=f"{ours} grad"
    )  # fmt: skip
    entries: dict[str, dict[str, Any]] = {name: {} for name in contestants}
    for (name, end), subject in subjects.items():
        batches[name].student.grad = None
        peak = timer.peak_bytes(subject, suite.device)
        entries[name][end] = timer.percentiles(times[f"{name} {end}"]) | {"peak_bytes": peak}
    over = {
        end: {
            name: timer.median_ratio(times[f"{name} {end}"], times[f"{ours} {end}"])
            for name in contestants
            if name != ours
        }
        for end in ENDS
    }
    rate = shape.floor_bytes() / statistics.median(times[f"{ours} grad"]) / 1e9
    return {
        "N": shape.N,
        "C": shape.C,
        "K": shape.K,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "floor_bytes": shape.floor_bytes(),
        "gradient_bytes": shape.N * shape.C * shape.dtype.itemsize,
        "ours": ours,
        "times": entries,
        "over": over,
        "model_gb_per_s": rate,
        "share_of_copy": rate / suite.copy_gb_per_s,
        "rounds": len(times[f"{ours} grad"]),
    }


def test_against_others(benchmark: Any, suite: Suite, shape: Shape) -> None:
    suite.extra.setdefault("engine_start_us", 1e6 * contestants.engine_start_seconds(suite.device))
    batch = shape.batch(suite.device)
    others, missing = contestants.others(suite.device, suite.max_autotune)
    truth = others["eager"].grad(batch)
    checked = {}
    for name, contestant in (contestants.ours(batch) | others).items():
        reason = contestants.disagreement(contestant, truth, batch)
        if reason is None:
            checked[name] = contestant
        elif name.startswith("camkd"):
            pytest.fail(f"{name}: {reason}")
        else:
            missing.append(f"{name} at {shape}: {reason}")
    del truth
    for reason in missing:
        suite.note(f"left out: {reason}")
    row = measure(suite, benchmark, shape, batch, checked, suite.seconds(8.0))
    suite.record(benchmark, {"grid": "compared", **row})


def test_over_classes(benchmark: Any, suite: Suite, shape: Shape) -> None:
    batch = shape.batch(suite.device)
    row = measure(suite, benchmark, shape, batch, contestants.ours(batch), suite.seconds(0.5))
    suite.record(benchmark, {"grid": "classes", **row})
