"""The launch table of the CUDA kernels, evaluated on the host for real devices."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.cuda.host import build

pytest.importorskip("camkd_fast._C")
pytest.importorskip("pybind11")

# Multiprocessors; shared memory of a block and of a multiprocessor; L2; blocks of a cluster; threads of a block; least
# blocks of a cooperative group.
H100 = (132, 227 * 1024, 228 * 1024, 50 << 20, 16, 256, 12, 18)
A100 = (108, 163 * 1024, 164 * 1024, 40 << 20, 1, 256, 0, 0)


@pytest.fixture(scope="module")
def emulated() -> ModuleType:
    return build.load_module()


def test_shipped_regimes(emulated: ModuleType) -> None:
    """Three teachers in 16 bits.

    The smallest batch runs in one cluster. Wider rows than a warp takes are read once, by pipelined blocks, of as many
    warps as leave few slots and multiprocessors idle.
    """
    emulated.set_limits(*H100)
    assert emulated.row_geometry(64, 100, 3, 8)[:5] == (True, 1, 1, 1, 8)
    assert emulated.row_geometry(16384, 1000, 3, 8)[0]
    for C, blocks, threads, pipelined in [
        (4096, 1, 128, True),
        (32000, 3, 448, True),
        (65537, 5, 576, True),
        (128256, 10, 544, True),
        (151936, 11, 576, True),
        (262144, 22, 512, True),
    ]:
        warp, _, _, chunks, *found = emulated.row_geometry(8192, C, 3, 8)
        assert (warp, chunks, *found[:2], found[-1]) == (False, 1, blocks, threads, pipelined)
    assert emulated.row_geometry(8192, 2_000_000, 3, 8)[3] > 1
    emulated.set_limits(*A100)
    assert emulated.row_geometry(8192, 128256, 3, 8)[3] > 1


@pytest.mark.parametrize(("K", "vector"), [(1, 8), (5, 8), (5, 4), (16, 8)])
def test_a_device_with_too_little_shared_memory_is_refused(emulated: ModuleType, K: int, vector: int) -> None:
    emulated.set_limits(2, 1024, 4096, 1 << 20, 8, 64, 0, 0)
    with pytest.raises(RuntimeError, match=f"a row of {K} teachers needs .* more .* than the device's 1024 bytes"):
        emulated.row_geometry(8, 4096, K, vector)


def regime(geometry: tuple[int, ...]) -> str:
    """A geometry in the words of docs/performance.md."""
    warp, _, _, chunks, blocks, threads, *_, cooperative, pipelined = geometry
    if warp:
        return "a warp"
    if chunks > 1:
        return f"{threads} threads, two reads"
    if pipelined:
        return f"{blocks} pipelined blocks of {threads}" if blocks > 1 else f"a pipelined block of {threads}"
    if cooperative:
        return f"{blocks} cooperative blocks of {threads}"
    return f"{blocks} blocks of {threads}" if blocks > 1 else f"{threads} threads"


def test_the_table_in_the_documentation(emulated: ModuleType) -> None:
    emulated.set_limits(*H100)
    text = (build.ROOT / "docs" / "performance.md").read_text()
    table = text.partition("<!-- regimes: start -->")[2].partition("<!-- regimes: end -->")[0]
    widths = [100, 1000, 2000, 4096, 8192, 21841, 32000, 65537, 128256, 151936, 262144]
    rows = [[f"{C:,}", *(regime(emulated.row_geometry(8192, C, 3, vector)) for vector in (8, 4))] for C in widths]
    assert table.strip().splitlines()[2:] == [f"| {' | '.join(row)} |" for row in rows]


@pytest.mark.parametrize("device", [H100, A100], ids=["H100", "A100"])
@pytest.mark.parametrize("vector", [4, 8])
def test_every_launch_fits(emulated: ModuleType, device: tuple[int, ...], vector: int) -> None:
    emulated.set_limits(*device)
    for C in (1, 10, 100, 1000, 1128, 2040, 2041, 21841, 32000, 65537, 128256, 151936, 262144, 2**30):
        for K in (1, 2, 3, 5, 16):
            for N in (1, 7, 24, 40, 289, 4096, 10**6):
                geometry = emulated.row_geometry(N, C, K, vector)
                _, rows, slots, chunks, per_group, threads, blocks, shared, cooperative, _ = geometry
                assert shared <= device[1] and threads % 32 == 0 and blocks % per_group == 0
                assert cooperative or per_group & (per_group - 1) == 0, "no cluster size of a device"
                # The blocks of a launch, before those that cannot be resident are left out, write three sums each.
                assert min(blocks, device[0] * 32) * 3 + 3 <= emulated.cuda_batch_floats(N)
                assert slots * chunks * threads * per_group * vector >= C and rows >= 1
