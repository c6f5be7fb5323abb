"""The feature loss with its confidence weights against eager PyTorch and torch.compile, at two end points.

- backward: forward + backward, with gradients for the student's feature maps and for the logits behind the weights.
  Ours is `weighted_feature_loss(...).backward()` with `confidence_weights`.
- grad: the loss and its gradient for the maps, the weights being constants, as in a training step. Ours is
  `camkd_feature_loss_and_grad`; the others use `torch.autograd.grad`.

Floor: both sets of features read once, one gradient written, the logits read and, for backward, their gradient written.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import shapes, timer
from benchmarks.conftest import Suite
from benchmarks.shapes import Features
from camkd_fast import camkd_feature_loss_and_grad, confidence_weights, weighted_feature_loss

pytestmark = pytest.mark.benchmark(timer=timer.CLOCK)

HOST_CALLS = 50
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


class Batch:
    """The tensors of one size, and both end points of a contestant."""

    def __init__(self, features: Features, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.student = [r.requires_grad_() for r in features.maps(generator)]
        self.teachers = features.maps(generator)
        options = {"generator": generator, "device": device, "dtype": features.dtype}
        self.constant = [torch.randn(features.N, features.C, **options).mul_(3) for _ in range(features.K)]
        self.logits = [z.clone().requires_grad_() for z in self.constant]
        self.target = torch.randint(features.C, (features.N,), generator=generator, device=device)

    def forget(self) -> None:
        for leaf in (*self.student, *self.logits):
            leaf.grad = None

    def backward(self, loss: Loss) -> Tensor:
        self.forget()
        value = loss(self.student, self.teachers, self.logits, self.target)
        value.backward()
        return value.detach()

    def by_autograd(self, loss: Loss) -> tuple[Tensor, list[Tensor]]:
        value = loss(self.student, self.teachers, self.constant, self.target)
        return value.detach(), list(torch.autograd.grad(value, self.student))

    def in_one_pass(self) -> tuple[Tensor, list[Tensor]]:
        out, grads = camkd_feature_loss_and_grad(self.student, self.teachers, self.constant, self.target)
        return out.loss, grads


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.option
    metafunc.parametrize("features", shapes.features(option.device, option.shapes), ids=str)


def test_feature_loss(benchmark: Any, suite: Suite, features: Features) -> None:
    batch = Batch(features, suite.device)
    torch._dynamo.reset()
    losses: dict[str, Loss] = {"camkd": fused, "eager": eager, "compile": torch.compile(eager, dynamic=False)}
    ends: dict[str, dict[str, Callable[[], Any]]] = {
        "backward": {name: lambda loss=loss: batch.backward(loss) for name, loss in losses.items()},
        "grad": {name: lambda loss=loss: batch.by_autograd(loss) for name, loss in losses.items()},
    }
    ends["grad"]["camkd"] = batch.in_one_pass
    tolerance = 1e-4 if features.dtype == torch.float32 else 3e-2
    _check(batch, ends, tolerance)
    times = {
        end: timer.interleaved(
            subjects, suite.device, seconds=suite.seconds(2.5),
            benchmark=benchmark if end == "backward" else None, watch="camkd" if end == "backward" else "",
        )
        for end, subjects in ends.items()
    }  # fmt: skip
    entries = {name: timer.percentiles(values) for name, values in times["backward"].items()}
    for name, entry in entries.items():
        batch.forget()
        entry["peak_bytes"] = timer.peak_bytes(ends["backward"][name], suite.device)
        batch.forget()
        entry["grad"] = timer.percentiles(times["grad"][name])
        entry["grad"]["peak_bytes"] = timer.peak_bytes(ends["grad"][name], suite.device)
        entry["grad"]["host_us"] = _host_us(ends["grad"][name], suite.device)
    suite.record(benchmark, _row(features, times, entries, suite.copy_gb_per_s))


def _check(batch: Batch, ends: dict[str, dict[str, Callable[[], Any]]], tolerance: float) -> None:
    """A contestant that computes something else must not be timed."""
    values = {name: float(subject()) for name, subject in ends["backward"].items()}
    results = {name: subject() for name, subject in ends["grad"].items()}
    for name, (value, grads) in results.items():
        assert abs(values[name] / values["eager"] - 1) < tolerance, values
        assert abs(float(value) / values["eager"] - 1) < tolerance, (name, float(value), values)
        for grad, expected in zip(grads, results["eager"][1], strict=True):
            assert float((grad - expected).norm() / expected.norm()) < tolerance, name


def _host_us(subject: Callable[[], object], device: torch.device) -> float:
    """Median time until a call returns to an idle device's host, in microseconds."""
    times = []
    for _ in range(HOST_CALLS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        subject()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def _row(
    features: Features, times: dict[str, dict[str, list[float]]], entries: dict[str, Any], copy_gb_per_s: float
) -> dict[str, Any]:
    def of(end: str) -> dict[str, Any]:
        floor = features.floor_bytes(learned_weights=end == "backward")
        rate = floor / statistics.median(times[end]["camkd"]) / 1e9
        return {
            "floor_bytes": floor,
            "over": {name: timer.median_ratio(times[end][name], times[end]["camkd"]) for name in ("eager", "compile")},
            "model_gb_per_s": rate,
            "share_of_copy": rate / copy_gb_per_s,
            "rounds": len(times[end]["camkd"]),
        }

    layout = ", channels_last" if features.channels_last else ""
    return {
        "features": f"{features.N} x {features.channels} x {features.side} x {features.side}{layout}",
        "C": features.C,
        "K": features.K,
        "dtype": str(features.dtype).removeprefix("torch."),
        "ours": "camkd",
        "times": entries,
        **of("backward"),
        "grad": of("grad"),
    }
