"""The CUDA kernel of rows of which some of the columns are here, executed on the host (see test_row_loss_on_host.py).

tests/backends/test_row_shards.py has the same for the other backends.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import shards
from tests.support.shards import DIVERGENCES, UNEVEN, WEIGHTINGS

pytest.importorskip("camkd_fast._C")
pytest.importorskip("pybind11")
from camkd_fast.backends import cuda as cuda_backend
from tests.cuda.host.on_host import cuda_on_the_host, emulated

__all__ = ["cuda_on_the_host", "emulated"]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.3])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("bounds", [UNEVEN, (0, 2400, 5003)], ids=["a warp per row", "a block per row"])
def test_every_divergence_weighting_and_temperature(
    bounds: tuple[int, ...], divergence: Any, weighting: str, temperature: float
) -> None:
    shards.check_formula(cuda_backend, bounds, divergence, weighting, temperature)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_masked_shards(divergence: Any) -> None:
    shards.check_masked_shards(cuda_backend, divergence)


def test_labels_of_no_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Assertions on labels do not hold for shards."""
    monkeypatch.setattr(cuda_backend, "DEBUG", True)
    shards.check_labels_of_no_shard(cuda_backend)


def test_gradient_in_place_and_its_scale() -> None:
    shards.check_gradient_in_place(cuda_backend)
