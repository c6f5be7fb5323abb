"""Fixtures of the tests of Triton kernels."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest


@pytest.fixture(params=["onchip", "streaming"])
def regime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both paths for the same small rows; streamed rows have several column blocks of one warp."""
    launch, row_loss = (importlib.import_module(f"camkd_fast.kernels.{name}") for name in ("launch_table", "row_loss"))
    if request.param == "streaming":

        def narrow(K: int, C: int, itemsize: int, ALIGN: int, two_labels: bool, beyond: bool) -> object:
            return launch.StreamingLaunch(32, 4 if ALIGN == 1 else min(ALIGN, 4), min(K, 2), 1, None)

        monkeypatch.setattr(row_loss, "on_chip", lambda *shape: False)
        monkeypatch.setattr(row_loss, "streaming_launch", narrow)
    row_loss.row_launcher.cache_clear()
    yield str(request.param)
    row_loss.row_launcher.cache_clear()
