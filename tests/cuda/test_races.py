"""The CUDA kernels on the host under ThreadSanitizer, and tests that it detects a missing barrier."""

from __future__ import annotations

import pytest

from tests.cuda.host import build

pytest.importorskip("camkd_fast._C")
pytest.importorskip("pybind11")


def test_no_races() -> None:
    """Every kernel and regime under ThreadSanitizer."""
    done = build.race_check()
    assert done.returncode == 0, done.stderr[:4000]


@pytest.mark.slow
@pytest.mark.parametrize("dropped", ["BLOCK_BARRIER", "WARP_BARRIER", "CLUSTER_BARRIER", "COPIES_WAIT", "MAILBOX_WAIT"])
def test_a_missing_barrier_is_detected(dropped: str) -> None:
    """Without one kind of barrier or wait the same run fails: by a reported race, a NaN, or a poisoned address."""
    assert build.race_check(dropped).returncode != 0
