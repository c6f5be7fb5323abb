"""backend="cuda" on CPU tensors, by the emulated device of this folder: context managers, and fixtures made of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType

import pytest

from camkd_fast.backends import dispatch
from camkd_fast.backends.whole_losses import WholeLosses
from camkd_fast.losses import checks
from tests.cuda.host import build

THREADS = 64  # of a block: two warps, the fewest that merge


@contextlib.contextmanager
def emulated_device(emulated: ModuleType) -> Iterator[None]:
    """backend="cuda" for CPU tensors."""
    from camkd_fast.backends import cuda as cuda_backend  # fails where the compiled module was not built

    refusal = dispatch._device_refusal
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            dispatch, "_device_refusal", lambda name, device: None if name == "cuda" else refusal(name, device)
        )
        patch.setattr(dispatch, "_compiled", dispatch._compiled.__wrapped__)
        patch.setattr(dispatch, "_whole_losses_on_cpu", dispatch._whole_losses_on_cpu.__wrapped__)
        patch.setattr(cuda_backend, "_C", emulated)
        whole = WholeLosses(emulated, "cuda_", lambda: (cuda_backend.DEBUG,))
        whole.connected = False
        patch.setattr(cuda_backend, "whole_losses", whole)
        patch.setattr(cuda_backend, "_device_of", lambda tensor: contextlib.nullcontext())
        patch.setattr(cuda_backend, "_stream_of", lambda tensor: 0)
        limit(emulated)
        yield


@contextlib.contextmanager
def in_one_call(emulated: ModuleType) -> Iterator[None]:
    """The logit loss takes one crossing into C++, and no longer the general path."""
    from camkd_fast.backends import cuda as cuda_backend

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_backend.whole_losses, "connected", True)
        yield


@contextlib.contextmanager
def labels_counted_by_backend() -> Iterator[None]:
    """CPU tensors take the path of GPU tensors, whose labels the host does not read: the backend computes the mean."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "count_labels", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def emulated() -> ModuleType:
    return build.load_module()


@pytest.fixture(autouse=True)
def cuda_on_the_host(emulated: ModuleType) -> Iterator[None]:
    """backend="cuda" for CPU tensors."""
    with emulated_device(emulated):
        yield


def limit(
    emulated: ModuleType,
    shared: int = 160 * 1024,
    cluster: int = 8,
    multiprocessors: int = 2,
    least_cooperative: int = 0,
    pipeline_warps: int = 0,
    of_all_blocks: int | None = None,
) -> None:
    of_all_blocks = of_all_blocks or 3 * (shared + 1024)
    emulated.set_limits(
        multiprocessors, shared, of_all_blocks, 1 << 20, cluster, THREADS, least_cooperative, pipeline_warps
    )


def enter(emulated: ModuleType, regime: str, K: int) -> None:
    """A device where a block has shared memory for one vector per thread and stream, in clusters of up to 8 or of 1, or
    with cooperative groups; or, for the pipelined kernel, of each of two rows."""
    shared = (K + 1) * THREADS * 16 + 3584
    if regime == "cooperative":
        limit(emulated, shared, cluster=1, multiprocessors=8, least_cooperative=2)
    elif regime == "pipelined":
        # Where this kernel is not to be had, cooperative groups
        limit(
            emulated,
            2 * (K + 1) * THREADS * 16 + 6144,
            cluster=1,
            multiprocessors=4,
            least_cooperative=2,
            pipeline_warps=2,
            of_all_blocks=shared + 1024,
        )
    elif regime == "table":
        limit(emulated)  # not that of an example before, whose shared memory may be too small for this K
    else:
        limit(emulated, shared, cluster=8 if regime == "cluster" else 1)
