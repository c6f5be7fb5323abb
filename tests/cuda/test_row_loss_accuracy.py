"""Accuracy of the CUDA row kernel on the host: converged students, and rows that need the general passes.

The fast path takes the logit at the label as the reference of all exponentials. Rows where that leaves the safe range,
because the label is far below the maximum, are summed up once more relative to their maxima. test_row_loss_on_host.py
describes how the kernels run on the host.
"""

from __future__ import annotations

from types import ModuleType

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from tests.support.converged import (
    FAR,
    NEAR,
    all_converged,
    assert_rounded_once,
    assert_rows,
    labels_at,
    nearly_certain,
    with_other_labels,
)
from tests.support.evaluate import run_value_and_grad
from tests.support.tolerance import assert_accurate
from tests.support.truth import naive, truth

pytest.importorskip("camkd_fast._C")
pytest.importorskip("pybind11")
from tests.cuda.host.on_host import cuda_on_the_host, emulated, enter

__all__ = ["cuda_on_the_host", "emulated"]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Widths on the reduced device of `enter`, by geometry: (warp per row, chunks, blocks per group, cooperative,
# pipelined).
GEOMETRIES = {
    "warp": ("table", 200, (True, 1, 1, False, False)),
    "shifted rows": ("table", 201, (True, 1, 1, False, False)),
    "block": ("table", 2100, (False, 1, 1, False, False)),
    "cluster": ("cluster", 1001, (False, 1, 2, False, False)),
    "cooperative": ("cooperative", 1001, (False, 1, 2, True, False)),
    "pipelined": ("pipelined", 1001, (False, 1, 2, True, True)),
    "chunks": ("chunks", 1001, (False, 2, 1, False, False)),
}


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("K", [1, 3, 5])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, 20.0])
def test_converged_students(temperature: float, K: int, dtype: torch.dtype) -> None:
    for what, case in all_converged(6, 400, K, dtype, temperature):
        assert_rounded_once(run_value_and_grad(case, "cuda").grad, case, what)


@pytest.mark.parametrize("two_labels", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_converged_students_in_every_geometry(emulated: ModuleType, geometry: str, two_labels: bool) -> None:
    regime, C, expected = GEOMETRIES[geometry]
    enter(emulated, regime, 3)
    for what, case in all_converged(4, C, 3, BF16, 4.0, two_labels):
        assert_rounded_once(run_value_and_grad(case, "cuda").grad, case, what)
    assert emulated.last_rows() == expected


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_labels_far_from_the_maximum(
    emulated: ModuleType, geometry: str, temperature: float, dtype: torch.dtype
) -> None:
    """Rows that need the general passes and rows that do not in one minibatch, for one group after the other."""
    regime, C, _ = GEOMETRIES[geometry]
    enter(emulated, regime, 3)
    assert_rows(labels_at([FAR[0], *NEAR, FAR[1], NEAR[1], *FAR], C, 3, dtype, temperature), "cuda")


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("height", [6.0, 10.0, 16.0, 20.0])
@pytest.mark.parametrize("geometry", ["warp", "block", "pipelined"])
def test_nearly_certain_rows(
    emulated: ModuleType, geometry: str, height: float, temperature: float, dtype: torch.dtype
) -> None:
    """Cross-entropies of 1e-6 to 0.5, beside which the rounding of the label's own exponential would be seen."""
    regime, C, _ = GEOMETRIES[geometry]
    enter(emulated, regime, 3)
    assert_rows(nearly_certain(height, C, 3, dtype, temperature), "cuda")


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("K", "temperature"), [(6, 1.0), (6, 4.0), (3, 3.3)])
@pytest.mark.parametrize("height", [10.0, 20.0, 24.0])
@pytest.mark.parametrize("geometry", ["warp", "block", "cluster", "chunks"])
def test_nearly_certain_rows_in_the_general_passes(
    emulated: ModuleType, geometry: str, height: float, K: int, temperature: float, dtype: torch.dtype
) -> None:
    """The same of the maximum's own exponential."""
    regime, C, _ = GEOMETRIES[geometry]
    enter(emulated, regime, K)
    case = nearly_certain(height, C, K, dtype, temperature)
    assert_rows(case, "cuda")
    by_entropy = case.with_(weighting="entropy")  # down to 1e-9
    weights = run_value_and_grad(by_entropy, "cuda").weights
    assert_accurate(weights, truth(by_entropy).weights, naive(by_entropy).weights)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_two_labels_far_from_the_maximum(emulated: ModuleType, geometry: str, dtype: torch.dtype) -> None:
    """The first label, the second one or both: only the last kind needs the general passes."""
    regime, C, _ = GEOMETRIES[geometry]
    enter(emulated, regime, 3)
    case = with_other_labels(labels_at([FAR[0], *NEAR, *FAR, NEAR[1]], C, 3, dtype, 4.0))
    for z in (case.student, *case.teachers):
        for row in (1, 3, 6):
            z[row, case.second_target[row]] = -250.0
    assert_rows(case, "cuda")


def test_cross_entropies_of_two_labels_do_not_cancel() -> None:
    """Relative to the first label they would: the second one is 24 above it and has nearly all of the share."""
    case = with_other_labels(labels_at([0.0] * 40, 200, 3, F32, 1.0)).with_(mix=torch.full((40,), 0.02))
    for z in (case.student, *case.teachers):
        z.scatter_(1, case.second_target.unsqueeze(1), 24.0)
    assert_rows(case, "cuda")


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    distances=st.lists(st.floats(-400, 400, width=16), min_size=1, max_size=9),
    geometry=st.sampled_from(list(GEOMETRIES)),
    K=st.integers(2, 5),
    dtype=st.sampled_from([F32, BF16, F16]),
    temperature=st.sampled_from([1.0, 2.0, 4.0]),
    seed=st.integers(0, 1000),
)
def test_any_labels(
    emulated: ModuleType,
    distances: list[float],
    geometry: str,
    K: int,
    dtype: torch.dtype,
    temperature: float,
    seed: int,
) -> None:
    regime, C, _ = GEOMETRIES[geometry]
    enter(emulated, regime, K)
    assert_rows(labels_at(distances, C, K, dtype, temperature, seed), "cuda")
