"""The loss from hidden states and heads, with both gradients, against other ways and against its matrix products.

T = 1, the soft term only, confidence weights, or one teacher. `share_of_products` is the time of the matrix products
that are needed, in our chunks, divided by ours: 1 is the limit.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import linear_contestants, shapes, timer
from benchmarks.conftest import Suite
from benchmarks.linear_contestants import Step, forget
from benchmarks.shapes import LinearBatch, Models
from camkd_fast import camkd_linear_loss
from camkd_fast.losses.linear_rows import chunks
from camkd_fast.losses.projection import default_logits_dtype

pytestmark = pytest.mark.benchmark(timer=timer.CLOCK)

CHUNK_BYTES = 1.6e9  # the default of camkd_linear_loss


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.option
    metafunc.parametrize("models", shapes.models(option.device, option.shapes), ids=str)


def ours(batch: LinearBatch) -> Tensor:
    forget(batch)
    loss = camkd_linear_loss(*batch).loss
    loss.backward()
    return loss.detach()


def test_linear_loss(benchmark: Any, suite: Suite, models: Models) -> None:
    torch._dynamo.reset()
    batch = models.batch(suite.device)
    logits = torch.float32 if models.dtype == torch.float32 else default_logits_dtype(batch.head)
    rows = _rows(models, logits, suite.device)
    steps = _steps(suite, models, rows, logits)
    _check(batch, steps, models)
    subjects = {name: partial(step, batch) for name, step in steps.items()}
    times = timer.interleaved(
        subjects, suite.device, seconds=suite.seconds(20.0), rounds=(5, 100), benchmark=benchmark, watch="camkd"
    )
    entries = {name: timer.percentiles(values) for name, values in times.items()}
    for name, entry in entries.items():
        forget(batch)
        entry["peak_bytes"] = timer.peak_bytes(subjects[name], suite.device)
    others = [name for name in steps if name not in ("camkd", "products")]
    suite.record(
        benchmark,
        {
            "N": models.N,
            "C": models.C,
            "H": [models.student, models.teacher],
            "K": models.K,
            "dtype": str(models.dtype).removeprefix("torch."),
            "logits_dtype": str(logits).removeprefix("torch."),
            "chunk_rows": rows,
            "operations": models.operations(),
            "tflops": models.operations() / statistics.median(times["camkd"]) / 1e12,
            "ours": "camkd",
            "times": entries,
            "over": {name: timer.median_ratio(times[name], times["camkd"]) for name in others},
            "share_of_products": timer.median_ratio(times["products"], times["camkd"]),
            "rounds": len(times["camkd"]),
        },
    )


def _rows(models: Models, logits: torch.dtype, device: torch.device) -> int:
    """Of our chunks."""
    row_bytes = (models.K + 1) * models.C * logits.itemsize
    parts = chunks(models.N, row_bytes, CHUNK_BYTES, None, models.student, device.type == "cuda")
    return max(part.stop - part.start for part in parts)


def _steps(suite: Suite, models: Models, rows: int, logits: torch.dtype) -> dict[str, Step]:
    steps: dict[str, Step] = {
        "camkd": ours,
        "products": linear_contestants.products(rows, logits),
        "eager": linear_contestants.eager,
        "chunked": linear_contestants.chunked(rows),
    }
    on_gpu = suite.device.type == "cuda"
    if on_gpu and (by_torch := linear_contestants.inductor()) is not None:
        steps["inductor"] = by_torch
    optional = {"trl": linear_contestants.trl} if models.K == 1 else {}
    optional |= {"liger": linear_contestants.liger} if on_gpu else {}
    for name, make in optional.items():
        try:
            steps[name] = make()
        except ImportError as error:
            suite.note(f"left out: {name} ({error})")
    return steps


def _check(batch: LinearBatch, steps: dict[str, Step], models: Models) -> None:
    """A contestant that computes something else must not be timed. Liger's weights are uniform."""
    tolerance = 1e-4 if models.dtype == torch.float32 else 3e-2
    found = {}
    for name, step in steps.items():
        if name == "products" or (name == "liger" and models.K > 1):
            continue
        value = float(step(batch))
        assert batch.hidden.grad is not None and batch.head.grad is not None
        found[name] = value, batch.hidden.grad.clone(), batch.head.grad.clone()
    expected = found["eager"]
    for name, (value, *grads) in found.items():
        assert abs(value / expected[0] - 1) < tolerance, (name, value, expected[0])
        for grad, other in zip(grads, expected[1:], strict=True):
            error = float((grad.float() - other.float()).norm() / other.float().norm())
            assert error < tolerance, (name, error)
