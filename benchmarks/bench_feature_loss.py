"""The feature loss with its confidence weights, forward + backward, against eager PyTorch and torch.compile.

The backward pass computes gradients for the student's feature maps and for the logits behind the weights. Floor: both
sets of features read once, one gradient written, the logits read and their gradient written: K N (3 M + 2 C) elements.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import timer
from benchmarks.conftest import Suite
from benchmarks.shapes import FEATURES, Features
from camkd_fast import confidence_weights, weighted_feature_loss

pytestmark = pytest.mark.benchmark(timer=timer.CLOCK)

Loss = Callable[[list[Tensor], list[Tensor], list[Tensor], Tensor], Tensor]


def eager(student: list[Tensor], teachers: list[Tensor], logits: list[Tensor], target: Tensor) -> Tensor:
    """sum_k w_k ||F_k - r_k||^2 as a PyTorch user would write it."""
    ce = torch.stack([F.cross_entropy(z, target, reduction="none") for z in logits])
    weights = (1.0 - ce.softmax(0)) / (len(logits) - 1)
    errors = torch.stack([(r - f).square().mean((1, 2, 3)) for r, f in zip(student, teachers, strict=True)])
    return (weights * errors).sum(0).mean()


def fused(student: list[Tensor], teachers: list[Tensor], logits: list[Tensor], target: Tensor) -> Tensor:
    weights, _ = confidence_weights(logits, target)
    return weighted_feature_loss(student, teachers, weights)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("features", FEATURES[metafunc.config.option.device], ids=str)


def test_feature_loss(benchmark: Any, suite: Suite, features: Features) -> None:
    generator = torch.Generator(suite.device).manual_seed(0)

    def maps() -> list[Tensor]:
        size = (features.N, features.channels, features.side, features.side)
        options = {"generator": generator, "device": suite.device, "dtype": features.dtype}
        return [torch.randn(size, **options) for _ in range(features.K)]

    student, teachers = [r.requires_grad_() for r in maps()], maps()
    logits = [
        torch.randn(features.N, features.C, generator=generator, device=suite.device, dtype=features.dtype)
        .mul_(3)
        .requires_grad_()
        for _ in range(features.K)
    ]
    target = torch.randint(features.C, (features.N,), generator=generator, device=suite.device)
    torch._dynamo.reset()
    losses: dict[str, Loss] = {"camkd": fused, "eager": eager, "compile": torch.compile(eager, dynamic=False)}

    def step(loss: Loss) -> Tensor:
        for leaf in (*student, *logits):
            leaf.grad = None
        value = loss(student, teachers, logits, target)
        value.backward()
        return value

    values = {name: float(step(loss)) for name, loss in losses.items()}
    tolerance = 1e-4 if features.dtype == torch.float32 else 3e-2
    assert all(abs(value / values["eager"] - 1) < tolerance for value in values.values()), values
    subjects = {name: lambda loss=loss: step(loss) for name, loss in losses.items()}
    times = timer.interleaved(
        subjects, suite.device, seconds=suite.seconds(5.0), benchmark=benchmark, watch="camkd"
    )  # fmt: skip
    rate = features.floor_bytes() / statistics.median(times["camkd"]) / 1e9
    entries = {name: timer.percentiles(values) for name, values in times.items()}
    for name, subject in subjects.items():
        for leaf in (*student, *logits):
            leaf.grad = None
        entries[name]["peak_bytes"] = timer.peak_bytes(subject, suite.device)
    row = {
        "features": f"{features.N} x {features.channels} x {features.side} x {features.side}",
        "C": features.C,
        "K": features.K,
        "dtype": str(features.dtype).removeprefix("torch."),
        "floor_bytes": features.floor_bytes(),
        "ours": "camkd",
        "times": entries,
        "over": {name: timer.median_ratio(times[name], times["camkd"]) for name in ("eager", "compile")},
        "model_gb_per_s": rate,
        "share_of_copy": rate / suite.copy_gb_per_s,
        "rounds": len(times["camkd"]),
    }
    suite.record(benchmark, row)
