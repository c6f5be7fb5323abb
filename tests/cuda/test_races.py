"""The CUDA kernels on the host under ThreadSanitizer, and tests that it detects a missing barrier."""

from __future__ import annotations

import pytest

from tests.cuda.host import build

pytest.importorskip("camkd_fast._C")
pytest.importorskip("pybind11")


@pytest.mark.slow
def test_no_races() -> None:
    """Every kernel and regime under ThreadSanitizer."""
    done = build.race_check()
    assert done.returncode == 0, done.stderr[:4000]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_races_with_delays(seed: int) -> None:
    """The same with delays of lanes, warps and blocks, which change no bit of a result."""
    done = build.race_check(CAMKD_DELAYS=str(seed))
    assert done.returncode == 0, done.stdout + done.stderr[:4000]


@pytest.mark.slow
@pytest.mark.parametrize(
    "dropped", ["BLOCK_BARRIER", "WARP_BARRIER", "CLUSTER_BARRIER", "COPIES_WAIT", "MAILBOX_WAIT", "PHASE_WAIT"]
)
def test_a_missing_barrier_is_detected(dropped: str) -> None:
    """Without one kind of barrier or wait the same run fails: by a reported race, a NaN, or a poisoned address."""
    assert build.race_check(dropped).returncode != 0


@pytest.mark.slow
def test_a_single_missing_block_barrier_shows() -> None:
    """Each block barrier outside the row kernel, removed one at a time. In the row kernel some barriers come before a
    stronger one on the paths that the run takes."""
    sites = [site for site in build.barrier_sites() if site[0] == "BLOCK_BARRIER" and "row_loss/" not in site[2]]
    assert len(sites) >= 6
    for _, address, lines in sites:
        assert build.race_check(CAMKD_DROP_SITE=address).returncode != 0, lines
